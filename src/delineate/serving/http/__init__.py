"""The HTTP gateway: the same jobs for browsers, curl and Prometheus.

It is a process of its own and a client of the front door, whose jobs it shows and whose limits it passes on. It holds
nothing: killed and started again, it loses no job, and an upload resumes with the same PUT.

::

    GET    /livez  /readyz  /metrics  /openapi.json
    GET    /v1/models
    POST   /v1/jobs?model=M&input=nii.gz&outputs=vtk,json      the scan is the body
    PUT    /v1/jobs/{id}?…                                     the same by an id of one's own, so it may be repeated
    GET    /v1/jobs  /v1/jobs/{id}  /v1/jobs/{id}/outputs/{name}
    DELETE /v1/jobs/{id}

A scan of several channels is one request, too: ``input=T1:nii.gz:SIZE&input=FLAIR:nii.gz:SIZE``, and the body is the
files one after another. Delineate's protocol wants all sizes before the first byte, and so nothing has to be remembered
between requests. One size may be left out where the body has a Content-Length.

Whoever asks shows the token of a key, ``Authorization: Bearer TOKEN``, and sees that key's jobs, also those sent over
ØMQ. Without keys the gateway serves loopback only, and refuses what a page from elsewhere makes a browser send. It
speaks plain HTTP: beyond loopback, put a reverse proxy that speaks TLS before it.

One file a concern: ``messages`` (what is asked and answered), ``desk`` (the way to the front door), ``endpoints``,
``description`` (OpenAPI), ``figures`` (Prometheus), ``gateway`` (the process, and what every request passes).
"""
