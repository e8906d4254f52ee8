"""What loft_ds raises of its own where it saves and loads."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of something else; nothing has been loaded from it."""
