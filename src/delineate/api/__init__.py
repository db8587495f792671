"""The functions behind the public names: each does what the command of its name does, with values in and out."""
