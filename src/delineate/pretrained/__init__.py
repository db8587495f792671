"""Networks whose weights others have published: what they are, and the store of their files."""
