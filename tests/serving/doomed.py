"""A front door that is killed: it plays clients and a worker in one process, and prints each promise once it is made.

``python doomed.py FOLDER SEED`` prints ``queued ID``, ``done ID LEASE``, ``acknowledged ID`` and ``fetched ID``.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
import uuid
from pathlib import Path

from delineate.serving.engine import Engine, Limits, Peer
from delineate.serving.protocol import (
    Ack,
    Chunk,
    Commit,
    Credit,
    Done,
    Fetch,
    Hello,
    Jobs,
    Message,
    Model,
    Open,
    Output,
    Part,
    Progress,
    Take,
    Work,
)
from delineate.serving.spool import Spool
from delineate.serving.store import Store

CLIENT = Peer(b"A", "A")
WORKER = Peer(b"w", "local", frozenset({"worker"}), local=True)


def scan_of(id: str) -> bytes:
    """What a job's input is: of a size and content that its id determines."""
    rng = random.Random(id)
    return rng.randbytes(rng.randrange(1, 200_000))


def main(folder: Path, seed: str) -> None:
    rng = random.Random(seed)
    engine = Engine(
        Store(folder / "jobs.sqlite"), Spool(folder / "spool"), Limits(disk_share=1.0, queue=10**6), now=time.time()
    )
    engine.models = {"liver": Model(name="liver", sha256="1" * 64, channels=("T1",), targets=("liver",))}

    def say(peer: Peer, message: Message, payload: bytes = b"") -> list[Message]:
        return [answer.message for answer in engine.handle(peer, message, payload, time.time())]

    say(CLIENT, Hello(versions=(1,)))
    say(WORKER, Hello(versions=(1,), client="w", role="worker"))
    unfinished = [told.job for told in say(CLIENT, Jobs(most=50))[0].jobs if told.state == "receiving"]
    while True:
        id = unfinished.pop() if unfinished else str(uuid.UUID(int=rng.getrandbits(128)))
        scan = scan_of(id)
        [credit] = say(CLIENT, Open(job=id, model="liver", parts=(Part(format="nii", size=len(scan)),)))
        assert isinstance(credit, Credit)
        for offset in range(credit.received[0], len(scan), 20_000):
            assert isinstance(say(CLIENT, Chunk(job=id, offset=offset), scan[offset : offset + 20_000])[0], Credit)
        told = say(CLIENT, Commit(job=id, sha256=(hashlib.sha256(scan).hexdigest(),)))[0]
        assert isinstance(told, Progress)
        print("queued", id, flush=True)
        if rng.random() < 0.5:
            continue
        [work] = [answer for answer in say(WORKER, Take()) if isinstance(answer, Work)]
        place = Path(work.folder)
        result = hashlib.sha256((place / "in0").read_bytes()).hexdigest().encode()
        (place / "out").mkdir()
        (place / "out" / "label.json").write_bytes(result)
        output = Output("label.json", len(result), hashlib.sha256(result).hexdigest())
        say(WORKER, Done(lease=work.lease, outputs=(output,)))
        print("done", work.job, work.lease, flush=True)
        if rng.random() < 0.5:
            say(CLIENT, Fetch(job=work.job, output="label.json"))
            print("acknowledged", work.job, flush=True)
            assert isinstance(say(CLIENT, Ack(job=work.job))[0], Ack)
            print("fetched", work.job, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
