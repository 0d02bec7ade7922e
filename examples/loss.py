"""Compute a loss on your own tensors: no config file, no trainer, no GPU."""

from __future__ import annotations

import torch

from anyflow_train.config.objectives import FlowMap
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.types import Roles, Setting


def flow_map_loss(samples: int = 8) -> torch.Tensor:
    """Compute the mean loss of stage 1 on random latents; its gradient flows into the network."""
    torch.manual_seed(0)
    network = AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        ffn_dim=32,
        num_layers=1,
    )
    student = NetworkFlowMap(network, None)
    batch = Batch(
        latents=torch.randn(samples, 2, 4, 8, 8),  # frames, channels, height, width
        condition=Condition(text=torch.randn(samples, 6, 8)),  # tokens, width of the text encoder
        negative=Condition(text=torch.zeros(1, 6, 8)),
        keys=tuple(f"clip {number}" for number in range(samples)),
        positions=tuple(range(samples)),
    )
    objective = FlowMapObjective.build(FlowMap(derivative_network="student"), Setting(global_batch=samples))
    draw = Draw(seed=0, step=0, positions=batch.positions, device=torch.device("cpu"))
    loss = objective(Roles(student=student, derivative=student), batch, draw)
    return (loss.per_sample * loss.weight).mean()


if __name__ == "__main__":
    loss = flow_map_loss()
    loss.backward()
    print(f"loss {loss.item():.4f}")
