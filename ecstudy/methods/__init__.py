"""One method per file, named as the file; adding a file adds the method (``ecstudy.registry``)."""
