"""The whole sync on four ranks with the paper's strided generation groups: training 1-4-1, generation tg = 2 on ranks 0, 2 and 1, 3."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from hybridflow.context import RankContext
from tests.tiny import VOCAB, make_model
from workers.config import ModelConfig, Precision, TrainConfig
from workers.generation.config import GenerationConfig
from workers.role_config import ActorConfig

PROMPT = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(1))


def test_vllm_scores_like_transformers_after_every_sync(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(run, args=(port, str(tmp_path)), nprocs=4)
    for rank in range(4):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["groups"] == [[0, 2], [1, 3]]
        assert max(result["gaps"]) < 5e-5
        assert result["received"] == result["bound"] > 0
        assert result["shared"] > 0


def run(rank: int, port: int, directory: str) -> None:
    from workers.actor import ActorWorker

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    config = ActorConfig(
        model=ModelConfig(path=f"{directory}/model"),
        train=TrainConfig(engine="threed", tp=4, precision=Precision.fp32),
        generation=GenerationConfig(tp=2, precision=Precision.fp32, max_model_len=64, kv_cache_bytes=2**22),
    )
    actor = ActorWorker(config, RankContext(rank=rank, world_size=4, local_rank=rank))
    gaps = []
    for step in range(2):
        with torch.no_grad():
            for parameter in actor.engine.local_parameters():
                for shard in parameter.shards:
                    shard.tensor.mul_(1.5 + step)
        report = actor.sync.run(step)
        actor.engine.save_pretrained(Path(directory, str(step)))
        dist.barrier()
        with torch.no_grad():
            log_probs = AutoModelForCausalLM.from_pretrained(f"{directory}/{step}").eval()(PROMPT[None]).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(-1, PROMPT[1:, None])[:, 0]
        gaps.append(float((torch.from_numpy(actor.sampler.engine.score(PROMPT.tolist())) - expected).abs().max()))
    Path(directory, f"{rank}.json").write_text(
        json.dumps(
            {
                "groups": actor.sampler.engine.layout.groups("tp"),
                "gaps": gaps,
                "received": actor.sync.certificate.received_max,
                "bound": actor.sync.certificate.bound_max,
                "shared": report.shared_bytes,
            }
        )
    )
    actor.close()
    dist.destroy_process_group()
