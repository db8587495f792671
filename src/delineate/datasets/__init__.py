"""A folder on disk becomes a data set: subjects and what is segmented in them."""
