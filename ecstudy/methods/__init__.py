"""One method per file; the file's name is the method's name, and adding a file adds the method (``ecstudy.registry``)."""
