"""The loss in chunks, and blocks computed twice, against the plain ones."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mars_lab.models.chunked_cross_entropy import chunked_cross_entropy
from mars_lab.models.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(num_layers=2, num_heads=2, width=16, context_length=24, vocab_size=97, loss_chunk_size=0)


def problem(dtype: torch.dtype, count: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 16, generator=generator, dtype=dtype)
    weight = torch.randn(97, 16, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(97, (count,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)), targets)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64])
def test_value_and_gradients_are_cross_entropys(chunk_size: int) -> None:
    hidden, weight, targets = problem(torch.float64)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_size)
    gradients = torch.autograd.grad(3.0 * loss, (hidden, weight))
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    expected_gradients = torch.autograd.grad(3.0 * expected, (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("mode", ["bf16 tensors", "autocast", "fp32"])
def test_in_half_precision_it_is_as_near_to_the_truth_as_the_plain_loss(mode: str) -> None:
    hidden, weight, targets = problem(torch.bfloat16 if mode == "bf16 tensors" else torch.float32)
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(plain(truth[0], truth[1], targets), truth)
    errors = {}
    for name, function in (("plain", plain), ("chunked", partial(chunked_cross_entropy, chunk_size=16))):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = function(hidden, weight, targets)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert [g.dtype for g in gradients] == [hidden.dtype, weight.dtype]
        errors[name] = [float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True)]
    for chunked, ordinary in zip(errors["chunked"], errors["plain"], strict=True):
        assert chunked <= 1.5 * ordinary + 1e-7  # the same roundings in another order


def test_logits_that_overflow_exp_are_handled() -> None:
    hidden, weight, targets = problem(torch.float32)
    loss = chunked_cross_entropy(hidden * 1e4, weight, targets, 16)
    torch.testing.assert_close(loss, plain(hidden * 1e4, weight, targets))


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, targets = problem(torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 16)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())


def test_a_second_differentiation_is_refused() -> None:
    hidden, weight, targets = problem(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, targets, 16)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; evaluate the loss again"):
        torch.autograd.grad(loss, hidden)


CHANGES: list[dict[str, Any]] = [
    {"loss_chunk_size": 10},
    {"activation_checkpointing": True},
    {"loss_chunk_size": 7, "activation_checkpointing": True},
]


def gradients_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    whole = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        whole[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return loss.detach(), whole


def build(seed: int = 0, **change: Any) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(dataclasses.replace(TINY, **change))


@pytest.mark.parametrize(
    "change",
    CHANGES,
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_model_has_the_same_gradients(change: dict[str, Any], dropout: float) -> None:
    """With tied embeddings, dropout's masks drawn again, and through the logits that sampling uses."""
    results = []
    for model in (build(dropout=dropout).double(), build(dropout=dropout, **change).double()):
        tokens = torch.randint(97, (3, 25), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        results.append(gradients_of(model, tokens))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-14)


def test_checkpointing_computes_each_block_twice_and_only_when_it_helps() -> None:
    model = build(activation_checkpointing=True)
    calls: list[int] = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.randint(97, (2, 25))
    gradients_of(model, tokens)
    assert len(calls) == 2
    with torch.no_grad():
        model(tokens[:, :-1])
    assert len(calls) == 3


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp bf16"])
@pytest.mark.usefixtures("one_rank")
def test_wrapped_models_have_the_gradients_of_the_plain_one(wrapper: str) -> None:
    """FSDP's weights are whole only inside the forward pass of the module they belong to."""
    tokens = torch.randint(97, (3, 25), generator=torch.Generator().manual_seed(1))
    expected = gradients_of(build(), tokens)
    model: nn.Module = build(loss_chunk_size=10, activation_checkpointing=True)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if wrapper == "fsdp bf16" else MixedPrecisionPolicy()
        assert isinstance(model, GPT2)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    # bf16 has 8 bits: 2^-8 relative to the largest of a sum's terms.
    rtol, atol = (2**-4, 1e-2) if wrapper == "fsdp bf16" else (1e-5, 1e-7)
    torch.testing.assert_close(gradients_of(model, tokens), expected, rtol=rtol, atol=atol)


PEAK = """
import resource, sys, torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from mars_lab.models.chunked_cross_entropy import chunked_cross_entropy
hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(20000, 8, requires_grad=True)
targets = torch.randint(20000, (4096,))
def loss(n, chunk):
    args = hidden[:n], weight, targets[:n]
    return chunked_cross_entropy(*args, chunk) if chunk else F.cross_entropy(F.linear(*args[:2]), args[2])
chunk = int(sys.argv[1])
loss(128, chunk).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(4096, chunk).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    """The logits alone are 313 MiB in fp32; a chunk of them 10 MiB."""
    kilobytes = {}
    for chunk in ("0", "128"):
        process = subprocess.run([sys.executable, "-c", PEAK, chunk], capture_output=True, check=True, timeout=120)
        kilobytes[chunk] = int(process.stdout)
    assert kilobytes["0"] > 313 * 1024
    assert kilobytes["128"] < 60 * 1024
