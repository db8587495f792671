"""The functions behind the public names: each does what the command of the same name does, on Python values."""
