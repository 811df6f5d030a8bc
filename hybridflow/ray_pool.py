"""RayPool: a pool of devices that Ray reserves (a placement group packed by node)."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from hybridflow import progress, waiting
from hybridflow.batch import Batch
from hybridflow.burial import TOKEN, end_processes, sample_stacks
from hybridflow.calls import Pending, Reply
from hybridflow.context import RankContext
from hybridflow.devices import device_environment
from hybridflow.errors import TooFewDevices
from hybridflow.host import Host, HostInfo, out_of_memory, read_stacks
from hybridflow.host_state import HostState
from hybridflow.pool import Parts, PoolSpec, ResourcePool, take_turns
from hybridflow.progress import activity
from hybridflow.protocols import Arguments
from hybridflow.waiting import CALLS
from hybridflow.worker import Worker

REMOTE_LOOK_S = 10.0
REMOTE_TIMEOUT_S = 5.0

NODE_MARK_AMOUNT = 0.001
"""How much a process asks for of a resource that marks nodes and is not used up: Ray gives every
node 1 of its accelerator type, whatever its number of devices."""


class RayPool(ResourcePool):
    """Hosts as Ray actors, one per device of a packed placement group."""

    def __init__(self, spec: PoolSpec | None = None, *, started: bool = True) -> None:
        """`started`: false for a pool that start_pools brings up together with others."""
        import ray

        if not ray.is_initialized():
            raise ValueError(
                "RayPool: this process is not connected to Ray; use it inside `with connect(...):`"
            )
        spec = spec or PoolSpec()
        self.spec = spec
        self.hosts: list[HostInfo] = []
        self._actors: list[Any] = []
        self._nodes: list[str] = []
        self._token = ""
        """Stands in the environment of this pool's processes and of all that they start."""
        self._roles: dict[str, tuple[type[Worker], Any]] = {}
        """Role -> its class and settings, in the order in which they were built."""
        self._kept_callers: dict[tuple[str, int], list[Any]] = {}
        self._group: Any = None
        self._seen_activity, self._seen_at = "", 0.0
        if started:
            try:
                take_turns([self._start()])
            except BaseException:
                self.close()
                raise

    def _start(self) -> Parts:
        """The start in parts; what one has begun goes on in other processes behind it."""
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._token = secrets.token_hex(8)
        with self._part(f"reserving {self.size} devices"):
            self._nodes = self._reserve()
        contexts = self._contexts(self._nodes)
        self._actors = list(map(self._start_host, contexts, self._nodes))
        hosts = self._starting("start", [actor.info.remote() for actor in self._actors])
        yield
        with self._part(f"starting {self.size} processes"):
            self.hosts = waiting.get(hosts)
        one_node = len(set(self._nodes)) == 1
        master = "127.0.0.1" if one_node else self.hosts[0].address
        timeout_s = self.spec.collective_timeout_s
        opening = self._starting("join", [self._actors[0].open_store.remote(master, timeout_s)])
        yield
        with self._part("connecting the processes"):
            (port,) = waiting.get(opening)
        joining = [actor.join.remote(master, port, timeout_s) for actor in self._actors]
        self._starting("join", joining)
        yield
        with self._part("connecting the processes"):
            waiting.get(joining)

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """Names a part of the start."""
        with activity(f"pool {self.name}"), activity(what):
            yield

    def _starting(self, method: str, replies: Sequence[Any]) -> Sequence[Any]:
        """The calls belong to the start, which has a deadline of its own."""
        self._watch(
            "host", method, replies, timeout_s=self.spec.start_timeout_s, answers_reply=False
        )
        return replies

    def _reserve(self) -> list[str]:
        """Reserves the devices; returns the node of every rank, neighbours in rank order on one
        node."""
        import ray
        from ray.util.placement_group import placement_group, placement_group_table

        bundle: dict[str, float] = {"CPU": self.spec.cpus_per_device}
        if self.spec.device == "cuda":
            bundle["GPU"] = 1
        if self.spec.node_resource:
            bundle[self.spec.node_resource] = NODE_MARK_AMOUNT
        self._group = placement_group(
            [bundle] * self.size, strategy="PACK", name=f"hybridflow/{self.name}"
        )
        if not self._group.wait(self.spec.start_timeout_s):
            raise TooFewDevices(
                f"pool {self.name!r}: {self.size} devices of {bundle} could not be reserved "
                f"within {self.spec.start_timeout_s:.0f} s; the cluster has "
                f"{ray.cluster_resources()}, free now {ray.available_resources()}; ask for fewer "
                "devices, add nodes, or wait for other jobs"
            )
        bundles = placement_group_table(self._group)["bundles_to_node_id"]
        self._bundles = sorted(bundles, key=lambda bundle: (bundles[bundle], bundle))
        return [bundles[bundle] for bundle in self._bundles]

    def _contexts(self, nodes: Sequence[str]) -> list[RankContext]:
        import ray

        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        contexts = []
        for rank, node in enumerate(nodes):
            on_node = nodes.count(node)
            # A node's CPU resource may be larger than its cores (embedded clusters oversubscribe),
            # never the threads.
            cores = (
                min(int(alive[node]["Resources"].get("CPU", 1)), os.cpu_count() or 1)
                if len(alive) == 1
                else 0
            )
            cores = cores or int(alive[node]["Resources"].get("CPU", 1))
            contexts.append(
                RankContext(
                    pool=self.name,
                    rank=rank,
                    world_size=self.size,
                    # Hosts with a GPU replace both by CUDA's index of theirs (devices.py).
                    local_rank=nodes[:rank].count(node),
                    device=self.spec.device,
                    node=alive[node]["NodeManagerAddress"],
                    num_threads=self.spec.threads_per_device or max(1, cores // on_node),
                    in_ray=True,
                    deterministic=self.spec.deterministic and self.spec.device == "cuda",
                )
            )
        return contexts

    def _start_host(self, context: RankContext, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._bundles[context.rank]
        )
        env = {"OMP_NUM_THREADS": str(context.num_threads), "TOKENIZERS_PARALLELISM": "false"}
        # torch's native code warns of what nobody can change (a binding to NUMA nodes, once per
        # process).
        env["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
        env[TOKEN] = self._token
        env |= device_environment(context) | dict(self.spec.env)
        roles = "+".join(self.spec.roles)
        options: dict[str, Any] = {
            "num_cpus": self.spec.cpus_per_device,
            "num_gpus": 1 if self.spec.device == "cuda" else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": env},
            "name": (
                f"{self.name}/{context.rank} {roles} (job {ray.get_runtime_context().get_job_id()})"
            ),
            "max_restarts": 0,
        }
        return ray.remote(Host).options(**options).remote(context, node, roles)

    @property
    def role_names(self) -> tuple[str, ...]:
        return tuple(self._roles)

    def begin_creating(
        self, role: str, worker_class: type[Worker], config: Any
    ) -> Callable[[], None]:
        self._check_usable()
        replies = [actor.create.remote(role, worker_class, config) for actor in self._actors]
        self._watch(role, "__init__", replies)

        def wait() -> None:
            self.read_replies(replies)
            self._roles[role] = (worker_class, config)

        return wait

    def submit(
        self,
        role: str,
        method: str,
        arguments: Sequence[Arguments],
        keep: Sequence[bool],
        num_columns: int,
    ) -> list[tuple[Any, list[Any]]]:
        self._check_usable()
        calls: list[tuple[Any, list[Any]]] = []
        for start, of_rank, keeps in zip(
            self._callers(f"{role}.{method}", num_columns), arguments, keep, strict=True
        ):
            # Ray serialises every argument by itself; none is sent that the host knows.
            sent: tuple[Any, ...] = ()
            if not keeps:
                sent = (of_rank, keeps)
            elif of_rank.args or of_rank.kwargs:
                sent = (of_rank,)
            refs = start.remote(*sent)
            calls.append((refs[0], list(refs[1:])) if num_columns else (refs, []))
        inputs: list[Any] = []
        for batch in chain.from_iterable(of_rank.batches() for of_rank in arguments):
            inputs += batch.refs()
        self._watch(role, method, [reply for reply, _ in calls], tuple(dict.fromkeys(inputs)))
        return calls

    def _callers(self, name: str, num_columns: int) -> list[Any]:
        """Each host's `call` under that name with a reply and that many columns; Ray takes long
        to make one, so they are kept."""
        if (name, num_columns) not in self._kept_callers:
            self._kept_callers[name, num_columns] = [
                actor.call.options(num_returns=1 + num_columns, name=name) for actor in self._actors
            ]
        return self._kept_callers[name, num_columns]

    def _watch(
        self,
        role: str,
        method: str,
        replies: Sequence[Any],
        inputs: tuple[Any, ...] = (),
        *,
        timeout_s: float | None = None,
        answers_reply: bool = True,
    ) -> None:
        CALLS.add(
            Pending(
                role=role,
                method=method,
                pool=self.name,
                replies=tuple(replies),
                stacks=self.stacks,
                kill=self.kill,
                describe_host=self.describe_host,
                explain_death=self.explain_death,
                activity=self.activity,
                timeout_s=timeout_s or self.spec.call_timeout_s,
                inputs=inputs,
                answers_reply=answers_reply,
            )
        )

    def read_replies(self, replies: Sequence[Any]) -> list[Reply]:
        return [Reply.unpacked(reply) for reply in waiting.get(replies)]

    def arrived(self, replies: Sequence[Any]) -> bool:
        import ray

        _, late = ray.wait(list(replies), num_returns=len(replies), timeout=0)
        return not late

    def prepare(self, batch: Batch) -> Batch:
        return batch.stored()

    def node(self, rank: int) -> str | None:
        return self.hosts[rank].node_id

    def nodes(self) -> set[str]:
        return {host.node_id for host in self.hosts}

    def pids(self) -> list[int]:
        return [host.pid for host in self.hosts]

    def describe_host(self, rank: int) -> str:
        """Process and node of a rank's host, for errors."""
        if rank >= len(self.hosts):
            return f"starting on node {self._nodes[rank]}"
        return f"pid {self.hosts[rank].pid} on {self.hosts[rank].address}"

    def explain_death(self, rank: int) -> str:
        """Whether the kernel's out-of-memory killer was at work on the rank's node."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if rank >= len(self.hosts):
            return ""
        host = self.hosts[rank]
        if host.node_id == self._node:
            return out_of_memory(host.oom_kills)
        if all(node["NodeID"] != host.node_id or not node["Alive"] for node in ray.nodes()):
            return "its node is gone"
        strategy = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
        task = ray.remote(out_of_memory).options(num_cpus=0, scheduling_strategy=strategy)
        answer = task.remote(host.oom_kills)
        try:
            return str(ray.get(answer, timeout=REMOTE_TIMEOUT_S))
        except RayError:  # the node is on its way out, or too slow to say anything
            return ""

    def activity(self) -> str:
        """Rank 0's. On another node a task reads it, at most every REMOTE_LOOK_S."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        hosts = self.hosts  # a thread that shows progress asks while the pool is started again
        if not self._actors or not hosts:
            return ""
        host = hosts[0]
        if host.node_id == self._node:
            return progress.read(Path(host.activity_file))
        if time.monotonic() - self._seen_at > REMOTE_LOOK_S:
            self._seen_at = time.monotonic()
            strategy = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
            task = ray.remote(progress.read).options(num_cpus=0, scheduling_strategy=strategy)
            answer = task.remote(Path(host.activity_file))
            done, _ = ray.wait([answer], timeout=REMOTE_TIMEOUT_S)
            self._seen_activity = ray.get(answer) if done else ""
        return self._seen_activity

    def look(self) -> Sequence[Any]:
        return [actor.look.remote() for actor in self._actors]

    def looked(self, answers: Sequence[Any]) -> list[HostState] | None:
        import ray
        from ray.exceptions import RayError

        done, late = ray.wait(list(answers), num_returns=len(answers), timeout=0)
        if late:
            return None
        states = []
        for answer in done:
            with suppress(RayError):  # its call says who has died
                states.append(ray.get(answer))
        return states

    def stacks(self) -> dict[int, str]:
        """Every host's Python stacks, also of hosts that are stuck in native code."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        answers = {}
        for rank, node in enumerate(self._nodes):
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": strategy}
            if rank < len(self.hosts):
                host = self.hosts[rank]
                task = ray.remote(read_stacks).options(**options)
                answers[rank] = task.remote(host.pid, host.stack_file)
            else:  # it has not said which process it is
                sample = ray.remote(sample_stacks).options(**options)
                answers[rank] = sample.remote(self._token, rank)
        done, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=30)
        stacks = dict.fromkeys(answers, "(its node did not answer within 30 s)")
        for rank, answer in answers.items():
            if answer in done:
                try:
                    stacks[rank] = ray.get(answer)
                except RayError as error:  # its node is lost
                    stacks[rank] = f"({type(error).__name__}: its node did not answer)"
        return stacks

    def kill(self, reason: str) -> None:
        """Ends all hosts at once; later calls say why."""
        self.broken = self.broken or reason
        self._end_processes()

    def clear(self) -> None:
        self._check_usable()
        waiting.get([actor.close.remote() for actor in self._actors])
        self._roles.clear()

    def close(self) -> None:
        import ray

        if self._actors and not self.broken and ray.is_initialized():
            ray.wait(
                [actor.close.remote() for actor in self._actors],
                num_returns=len(self._actors),
                timeout=10,
            )
        self.broken = self.broken or "closed"
        self._end_processes()

    def restarting(self) -> Parts:
        self.broken = self.broken or "it is being restarted"
        self._end_processes()
        with activity(f"ending the processes of pool {self.name}"):
            self._bury()
        yield
        self.broken = ""
        try:
            yield from self._start()
            building = []
            for role, (worker_class, config) in self._roles.items():
                building.append((role, self.begin_creating(role, worker_class, config)))
            yield
            for role, wait in building:
                with activity(f"building {role}", detail=self.activity):
                    wait()
        except BaseException:
            self.broken = self.broken or "its restart failed"
            self._end_processes()
            raise

    def _end_processes(self) -> None:
        import ray

        CALLS.forget(self.name)
        if not ray.is_initialized():
            return
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        self._kept_callers = {}
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None
        for host in self.hosts:
            Path(host.stack_file).unlink(missing_ok=True)
            Path(host.activity_file).unlink(missing_ok=True)

    def _bury(self) -> None:
        """Ends what the processes leave behind on nodes that are still there: a stopped process
        ignores Ray's kill, children outlive their parent, and device memory comes back late."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        answers: dict[Any, str] = {}
        for node in sorted(set(self._nodes) & alive_nodes()):
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(end_processes).options(num_cpus=0, scheduling_strategy=strategy)
            answer = task.remote(self._token, self.spec.device, self.spec.bury_s)
            answers[answer] = node
        left: list[str] = []
        deadline = time.monotonic() + 2 * self.spec.bury_s
        while answers and time.monotonic() < deadline:
            done, _ = ray.wait(list(answers), timeout=waiting.POLL_S)
            for answer in done:
                try:
                    (of_node,) = ray.get([answer])
                    left += of_node
                except RayError:
                    if answers[answer] in alive_nodes():
                        raise
                del answers[answer]
            # A node that is lost takes its processes with it, and Ray may learn of it only now.
            alive = alive_nodes()
            answers = {answer: node for answer, node in answers.items() if node in alive}
        if left or answers:
            raise RuntimeError(
                f"pool {self.name!r}: its processes could not be ended: "
                f"{'; '.join(left) or 'a node does not answer'}"
            )
        self.hosts = []


def start_pools(specs: Sequence[PoolSpec]) -> list[RayPool]:
    """Pools whose processes start at the same time; where one does not, none is left."""
    pools = [RayPool(spec, started=False) for spec in specs]
    try:
        take_turns([pool._start() for pool in pools])
    except BaseException:
        for pool in pools:
            pool.close()
        raise
    return pools


def alive_nodes() -> set[str]:
    """Ids of the cluster's nodes that Ray takes for alive and starts tasks on, which it does not on
    those that leave."""
    import ray
    from ray._private.state import state

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return alive - set(state.get_draining_nodes())
