"""`cvlab queue`: runs that wait in a queue, and processes that run them one after the other or side by side."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import run as api_run
from cvlab.config import loading
from cvlab.data.resolve import DownloadPolicy
from cvlab.distributed import process_group
from cvlab.errors import CvlabError, ExpectationError, RunDirError
from cvlab.reports.tables import number
from cvlab.runs import queue, removal, trust
from cvlab.runs.find import config_path, point_latest, read_config
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.queue import QueueItem
from cvlab.runs.records import ENDED, is_run, read_json, read_status
from cvlab.storage import atomic, lock
from cvlab.sweeps import results
from cvlab.sweeps.executors import Limits, SubmitConfig
from cvlab.sweeps.scheduler import QueueScheduler, has_ended

Result = dict[str, Any]
OVERRIDE = "command line"  # the source of a key that the command line has set
WAITING, MISSING = "waiting", "removed"  # statuses of items whose runs have not started, or are no longer there


def add(loaded: loading.Loaded, policy: DownloadPolicy, root: Path) -> Result:
    """Append a configuration to the queue, with its run directory.

    The user's files that it names are copied: later edits do not change what will be run.

    Args:
        loaded: The configuration.
        policy: What may be done about missing data, which is fetched now.
        root: The folder of the runs.

    Raises:
        CvlabError: The configuration cannot run.
    """
    experiment = registry.get_experiment(loaded.config.experiment)
    loaded = dataclasses.replace(loaded, config=experiment.prepare(loaded, policy))
    item = queue.add(root, api_run.create(loaded, root, is_latest=False))
    return {"ok": True, **describe(item)}


def describe(item: QueueItem) -> Result:
    """Return an item's number, run, overrides, status, and how it ended or the error that ended it."""
    row: Result = {"item": item.number, "run": str(item.run), "status": MISSING, "code": RunDirError.code, "result": ""}
    row |= {"overrides": [], "error": f"{item.run}: the run directory is gone"}
    if not is_run(item.run):
        return row
    try:
        status, overrides = read_status(item.run), _overrides(item.run)
    except CvlabError as error:
        return row | {"status": "damaged", "error": str(error)}
    state = status.get("status", WAITING)
    result = results.outcome_text(item.run) if state not in (WAITING, "running") else ""
    code = {"failed": status.get("code", 1), "expectations_failed": ExpectationError.code}.get(state)
    reason = status.get("error") if state == "failed" else None
    return row | {"status": state, "code": code, "result": result, "overrides": overrides, "error": reason}


def _overrides(run: Path) -> list[str]:
    """Return what the command line changed in the configuration of a run, as `key=value`."""
    sources = read_json(run / "env.json").get("provenance")
    config = read_config(run)
    keys = [key for key, source in sources.items() if source == OVERRIDE] if isinstance(sources, dict) else []
    return [f"{key}={number(config[key])}" for key in keys if key in config]


def list_items(root: Path) -> Result:
    """Return all items of the queue, in order."""
    rows = [describe(item) for item in queue.items(root)]
    return {"ok": True, "count": len(rows), "items": rows}


def remove(root: Path, references: list[str], with_done: bool) -> Result:
    """Remove items from the queue; the run directories of those that have never started are deleted.

    Args:
        root: The folder of the runs.
        references: Numbers of items, or names of their runs.
        with_done: Also remove all items that are done.

    Raises:
        RunDirError: An item does not exist or is being run. Nothing is removed then.
    """
    chosen = dict.fromkeys(queue.find(root, references))
    if with_done:
        chosen |= dict.fromkeys(item for item in queue.items(root) if describe(item)["status"] == "done")
    claims: dict[QueueItem, lock.RunLock] = {}
    try:
        for item in chosen:
            held = queue.claim(item)
            if held is None:
                raise RunDirError(f"item {item.number} is in use by a `cvlab queue run`", "stop that first")
            claims[item] = held
        rows = []
        for item, held in claims.items():
            row = describe(item)
            if row["status"] == WAITING:
                removal.remove(item.run)
            queue.remove(item, held)
            rows.append(row | {"deleted": row["status"] == WAITING})
    finally:
        for held in claims.values():
            held.release()
    return {"ok": True, "items": rows}


class _Claims:
    """The items that this process runs, in order; each is locked until the process ends."""

    def __init__(self, root: Path, workers: int, retry: bool, is_trusted: bool) -> None:
        self.root, self.workers, self.retry, self.is_trusted = root, workers, retry, is_trusted
        self.locks: dict[Path, lock.RunLock] = {}  # by the folder of the item
        self.rejected: dict[str, CvlabError] = {}  # by the name of the run

    def next(self) -> Path | None:
        """Claim the next item and return its run directory; None if there is none at present."""
        for item in queue.items(self.root):
            if item.folder in self.locks or not self._is_open(item):
                continue
            held = queue.claim(item)
            if held is None:
                continue
            self.locks[item.folder] = held
            if not self._is_open(item):  # another process has just finished it
                continue
            try:
                trust.require_trust(item.run, self.is_trusted)
                self._share_threads(item.run)
            except CvlabError as error:
                self.rejected[item.run.name] = error
                console.info(f"{item.run.name}: {error}")
                continue
            point_latest(self.root, item.run)
            return item.run
        return None

    def close(self) -> None:
        """Release all items."""
        for held in self.locks.values():
            held.release()

    def _is_open(self, item: QueueItem) -> bool:
        """Return whether an item is to be run."""
        if not is_run(item.run) or has_ended(item.run):
            return False
        try:
            return self.retry or read_status(item.run).get("status") != "failed"
        except CvlabError:
            return False

    def _share_threads(self, run: Path) -> None:
        """Fix the threads of a run that has not started to its share of this machine, if it is not the only one."""
        if self.workers == 1 or read_status(run):
            return
        config = loading.load(str(config_path(run))).config
        if getattr(config, "threads", 1) is None:
            threads = process_group.threads_per_process(self.workers)
            atomic.write_text(run / "config.yaml", config.model_copy(update={"threads": threads}).to_yaml())


def run(root: Path, workers: int, retry: bool, is_trusted: bool) -> Result:
    """Run the items of the queue that have not ended, those added meanwhile included.

    Args:
        root: The folder of the runs.
        workers: Number of concurrent runs.
        retry: Also run items that failed before.
        is_trusted: Whether code in run directories of others may run.

    Returns:
        All items, as `list_items` does, with `ok`, and for the first one that failed `error`, its text and code.

    Raises:
        StoppedError: A signal was received; the runs have been saved.
    """
    claims = _Claims(root, workers, retry, is_trusted)
    total = sum(map(claims._is_open, queue.items(root)))
    console.info(f"{total} items to run, {workers} at a time")
    limits = Limits(root.resolve(), workers, SubmitConfig())
    scheduler = QueueScheduler(console.info, limits, total, claims.next)
    with StopRequest() as stop, contextlib.closing(claims):
        scheduler.run(stop)
        if stop.received is not None:
            stopped = stop.error(scheduler.done, "", "item")
            stopped.hint = "continue with `cvlab queue run`"
            raise stopped
    rows = list_items(root)["items"]
    for row in rows:
        name = os.path.basename(row["run"])  # noqa: PTH119 - a name, which may not exist
        if name in scheduler.failed and row["status"] not in ENDED:
            code, message = scheduler.failed[name]
            row |= {"code": code if code > 0 else 128 - code, "error": message}
        if name in claims.rejected:
            row |= {"code": claims.rejected[name].code, "error": str(claims.rejected[name])}
    return {"ok": not any(row["code"] for row in rows), "count": len(rows), "items": rows}
