"""Resharding: moving a model's weights from any layout to any other, compiled, certified and
attested.

source = ShardMap.gather(engine.local_parameters(), group)
target = ShardMap.gather(generator.destinations(), group)
plan = compile(source, target, bucket_bytes=64 << 20)
print(verify(plan))                                     # the certificate
executor = Executor(plan, engine.local_parameters(), generator.destinations(), group)
attestor = Attestor(plan.source, engine.local_parameters(), plan.target, generator.destinations(), group)
executor.run()                                          # at every sync
attestor.run()                                          # and after it
"""

from hybridflow.resharding.attest import AttestationError, Attestor, Parts, attest
from hybridflow.resharding.cache import compile_cached
from hybridflow.resharding.certificate import Certificate, PlanError, verify
from hybridflow.resharding.execute import ExecutionReport, Executor, execute
from hybridflow.resharding.plan import ReshardingPlan, compile
from hybridflow.resharding.shard_map import ParameterSpec, ShardMap
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard

__all__ = [
    "AttestationError",
    "Attestor",
    "Box",
    "Certificate",
    "ExecutionReport",
    "Executor",
    "LocalParameter",
    "LocalShard",
    "ParameterSpec",
    "Parts",
    "PlanError",
    "ReshardingPlan",
    "ShardMap",
    "attest",
    "compile",
    "compile_cached",
    "execute",
    "verify",
]
