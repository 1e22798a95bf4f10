"""What `download` is made of: the cache, the notes, the child process, and how each failure is worded."""
