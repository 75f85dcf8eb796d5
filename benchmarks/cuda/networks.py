"""The raced models in PyTorch: untrained, with the layers that the ONNX files have.

    model = network("resnet18")    # float32, eval mode

Convolutions, their BatchNorm and their activation stand in one `Sequential`, so that `folded` can
fold the BatchNorm, as a user would who wants the model fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CLASSES = 1000
# expansion, output channels, repeats, stride of the first, kernel
Rows = tuple[tuple[int, int, int, int, int], ...]
# Sandler et al., "MobileNetV2", CVPR 2018, table 2
MOBILENETV2: Rows = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
# Tan and Le, "EfficientNet", ICML 2019, table 1; lite0 has no squeeze-and-excitation, and ReLU6
EFFICIENTNET_LITE0: Rows = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def conv_norm(
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[..., nn.Module] | None = None,
) -> nn.Sequential:
    """Return a convolution without bias, its BatchNorm, and perhaps an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut: He et al., CVPR 2016, option B."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            conv_norm(inputs, outputs, 3, stride, activation=nn.ReLU),
            conv_norm(outputs, outputs, 3),
        )
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.convs(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; and the sum with the input where it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, size: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = [conv_norm(inputs, wide, 1, activation=nn.ReLU6)] if expansion > 1 else []
        depthwise = conv_norm(wide, wide, size, stride, groups=wide, activation=nn.ReLU6)
        self.convs = nn.Sequential(*expand, depthwise, conv_norm(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convs(x)
        return x + y if self.residual else y


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def mobile(rows: Rows) -> nn.Module:
    """Return a network of inverted residuals: 32 channels first, 1280 last."""
    layers: list[nn.Module] = [conv_norm(3, 32, 3, 2, activation=nn.ReLU6)]
    inputs = 32
    for expansion, outputs, repeats, stride, size in rows:
        for repeat in range(repeats):
            first = stride if repeat == 0 else 1
            layers.append(InvertedResidual(inputs, outputs, expansion, first, size))
            inputs = outputs
    return nn.Sequential(*layers, conv_norm(inputs, 1280, 1, activation=nn.ReLU6), *head(1280))


class Encoder(nn.Module):
    """MiniLM-L6: transformers' BertModel with PyTorch's fused attention; hidden states only."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(**MINILM, attn_implementation="sdpa", return_dict=False)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        states: torch.Tensor = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )[0]
        return states


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenetv2": lambda: mobile(MOBILENETV2),
    "efficientnet-lite0": lambda: mobile(EFFICIENTNET_LITE0),
    "minilm": Encoder,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """Build a model whose activations stay in the range of a trained network's."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # an average: after one batch, that batch's statistics
        with torch.no_grad():
            model.train()(torch.randn(2, 3, 224, 224))
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        for at, (first, second) in enumerate(zip(module, list(module)[1:], strict=False)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[at] = fuse_conv_bn_eval(first, second)
                module[at + 1] = nn.Identity()
    return model


def macs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Count the multiply-accumulates of one inference."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return int(counter.get_total_flops()) // 2
