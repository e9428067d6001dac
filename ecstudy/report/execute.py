"""Run a notebook with parameters: papermill with kernels over IPC, a bar, and nothing half-written left behind.

``python -m ecstudy.report.execute notebooks/dlrm.ipynb out.ipynb -f notebooks/profiles/quick/dlrm.yaml``
does what ``papermill`` does with the same arguments. Kernels over IPC need no free port, and each has a folder of its own
for its sockets, so several may start at once.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ..extras import need


def execute(source, target, parameters: dict | None = None, *, progress: bool | None = None) -> Path:
    """Execute ``source`` with ``parameters`` and write the result to ``target`` when every cell has run.

    Raises
    ------
    FileNotFoundError
        If the notebook is not there.
    papermill.PapermillExecutionError
        If a cell fails; the notebook up to that cell is kept as ``<target>.failed``.
    """
    papermill = need("papermill", "book")
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"no notebook {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_name(target.name + ".failed")
    part = target.with_name(f".{target.stem}.{os.getpid()}.ipynb")
    bar = (sys.stderr.isatty() or bool(os.environ.get("CI"))) if progress is None else progress
    try:
        with tempfile.TemporaryDirectory(prefix="ec-", ignore_cleanup_errors=True) as sockets:
            papermill.execute_notebook(str(source), str(part), parameters or {}, progress_bar=bar,
                                       kernel_name="python3", **_transport(sockets))
    except papermill.PapermillExecutionError:
        part.replace(failed)
        raise
    except BaseException:                                 # a kernel that does not start, ctrl-C
        part.unlink(missing_ok=True)
        raise
    _tidy(part)
    part.replace(target)
    failed.unlink(missing_ok=True)
    return target


def _transport(sockets: str) -> dict:
    """A kernel manager over IPC in a folder, where sockets in the file system work and their path is short enough."""
    if os.name == "nt" or len(sockets) > 90:              # a socket's path may have 107 bytes
        return {}
    need("jupyter_client", "book")
    from jupyter_client.manager import AsyncKernelManager

    class IpcKernelManager(AsyncKernelManager):
        transport = "ipc"
        ip = os.path.join(sockets, "kernel")              # by default all kernels of a working folder meet in one name

    return {"kernel_manager_class": IpcKernelManager}


def _tidy(path: Path) -> None:
    """Show the parameters that were used, not the defaults; drop run times and machine paths from the metadata."""
    nbformat = need("nbformat", "book")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    injected = any("injected-parameters" in c.metadata.get("tags", []) for c in notebook.cells)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
        elif "parameters" in tags and injected:
            cell.metadata["tags"] = [*(t for t in tags if t != "hide-input"), "remove-cell"]
    nbformat.write(notebook, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ecstudy.report.execute", description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("-f", "--file", help="YAML file of parameters")
    given = parser.parse_args(arguments)
    parameters = need("yaml", "book").safe_load(Path(given.file).read_text()) if given.file else {}
    print(f"running {given.source}" + (f" with {given.file}" if given.file else ""), file=sys.stderr)
    execute(given.source, given.target, parameters)
    print(f"wrote {given.target}", file=sys.stderr)


if __name__ == "__main__":
    main()
