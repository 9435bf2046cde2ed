"""Run trials as Ray core tasks, on an existing cluster or on one for the time of the sweep.

References: Moritz et al., 2018, "Ray: A Distributed Framework for Emerging AI Applications".
Differences from Ray Tune: Ray only places and starts processes. It retries nothing and stores nothing, which the
scheduler and the run directories do.
"""

import logging
import os
import signal
import socket
from collections.abc import Mapping
from typing import Any

from cvlab.errors import ConfigError, DeviceError, StoppedError
from cvlab.runs.interrupt import EXIT_TERMINATED, StopRequest
from cvlab.sweeps.executors import EXIT_LOST, POLL_SECONDS, Events, Limits, NextTask, SubmitConfig, Task, node

SAVE_SECONDS = 60.0  # for trials to save and exit
ANSWER_SECONDS = 5.0  # Ray itself waits for minutes
CHILDREN_SAVE = {"RAY_kill_child_processes_on_worker_exit": "false"}  # they exit by themselves, after a checkpoint
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # listen on this machine only, as Ray does on other systems


def run(next_task: NextTask, limits: Limits, stop: StopRequest) -> Events:
    """Run each trial as a task, as many as fit on the cluster unless `limits.workers` is set."""
    _connect(limits.submit)
    import ray

    submit = limits.submit
    remote = ray.remote(node.run).options(max_retries=0, num_cpus=submit.cpus, num_gpus=submit.gpus)
    running: dict[Any, Task] = {}
    is_stopping = False
    try:
        while True:
            capacity = limits.workers or max(1, _capacity(ray.nodes(), submit))
            while stop.received is None and len(running) < capacity and (task := next_task()) is not None:
                running[remote.remote(node.remote_task(task))] = task
            if not running:
                return
            if stop.received is not None and not is_stopping:
                is_stopping = True
                _cancel(running)
            for done in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                task = running.pop(done)
                yield node.task_result(task, _remote_result(done))
            yield None
    finally:
        _cancel(running)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=SAVE_SECONDS)
        ray.shutdown()


def _connect(submit: SubmitConfig) -> None:
    """Connect to the cluster at an address, or start one.

    Raises:
        ConfigError: if there is no cluster at the address.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"} | ({} if submit.address else LOOPBACK | CHILDREN_SAVE)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if submit.address and ":" in submit.address:
        _ping(submit.address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=submit.address or "local",
            include_dashboard=None if submit.address else False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": CHILDREN_SAVE | node.cvlab_environment()} if submit.address else None,
        )
        _require_capacity(ray.nodes(), submit)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        problem = f"no Ray cluster at {submit.address}" if submit.address else "Ray does not start"
        raise ConfigError(f"{problem}: {_first_sentence(error)}", "`ray start --head` starts a cluster") from error
    except SystemExit:  # how Ray handles a signal while it starts
        raise StoppedError("interrupted by SIGTERM", "", EXIT_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray installs its own handler, which exits at once


def _ping(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}", "`ray status` shows its address") from error


def _capacity(nodes: list[dict[str, Any]], submit: SubmitConfig) -> int:
    """Return how many trials fit on the nodes that are alive."""
    return sum(_fits(row["Resources"], submit) for row in nodes if row["Alive"])


def _fits(resources: Mapping[str, float], submit: SubmitConfig) -> int:
    fits = int(resources.get("CPU", 0) / submit.cpus)
    return min(fits, int(resources.get("GPU", 0) / submit.gpus)) if submit.gpus else fits


def _require_capacity(nodes: list[dict[str, Any]], submit: SubmitConfig) -> None:
    """Raise DeviceError if no node has the resources of one trial, which would then wait forever."""
    if _capacity(nodes, submit) == 0:
        import ray

        ray.shutdown()
        raise DeviceError(
            f"no node of the Ray cluster has room for a trial with cpus: {submit.cpus} and gpus: {submit.gpus}",
            "lower submit.cpus or submit.gpus",
        )


def _cancel(running: Mapping[Any, Task]) -> None:
    import ray

    for task in running:
        ray.cancel(task)


def _remote_result(task: Any) -> node.RemoteResult:
    """Return the result of a task, EXIT_LOST if it was lost with its node or worker."""
    import ray

    try:
        result: node.RemoteResult = ray.get(task)
        return result
    except ray.exceptions.TaskCancelledError:
        return EXIT_TERMINATED, "canceled"
    except ray.exceptions.RayTaskError as error:  # for example a node without cvlab
        return 1, str(error).splitlines()[-1]
    except ray.exceptions.RayError as error:
        return EXIT_LOST, f"{type(error).__name__}: {_first_sentence(error)}"


def _first_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
