import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2, GPT2Config, generate
from mars_lab.models.gpt2_hf import load_hf_state_dict, to_hf_state_dict

TINY = GPT2Config(num_layers=3, num_heads=2, width=16, context_length=12, vocab_size=50)


def make_pair(bias: bool, scale: bool, attention: str) -> tuple[GPT2, GPT2LMHeadModel]:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        HFConfig(
            vocab_size=50,
            n_positions=12,
            n_embd=16,
            n_layer=3,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            scale_attn_by_inverse_layer_idx=scale,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).double()
    theirs.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Norms and biases start at 1 and 0, where a mix-up would not show.
            parameter += 0.3 * torch.randn_like(parameter)
            if not bias and name.endswith("bias"):
                parameter.zero_()
    config = GPT2Config(3, 2, 16, 12, 50, bias=bias, scale_attn_by_inverse_layer_idx=scale)
    ours = GPT2(config).double()
    load_hf_state_dict(ours, theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_gradients_equal_hugging_face(bias: bool, scale: bool, attention: str) -> None:
    ours, theirs = make_pair(bias, scale, attention)
    tokens = torch.randint(0, 50, (2, 12))
    targets = torch.randint(0, 50, (2 * 12,))
    logits, expected = ours(tokens), theirs(tokens).logits
    # Float64 carries 16 digits; 1e-10 leaves room for another order of summation, not for another formula.
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits.flatten(0, 1), targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        transposed = "attn.c_" in name or "mlp.c_" in name
        want = gradient.T if transposed and parameter.dim() == 2 else gradient
        torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-10, msg=name)
        compared += 1
    assert compared == (len(gradients) if bias else sum(not n.endswith("bias") for n in gradients))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_return_to_hugging_face(bias: bool) -> None:
    ours, theirs = make_pair(bias, scale=True, attention="eager")
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(to_hf_state_dict(ours), strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_biases_are_not_dropped_silently() -> None:
    _, theirs = make_pair(bias=True, scale=True, attention="eager")
    with pytest.raises(InputError, match=r"bias has no place .* bias=True"):
        load_hf_state_dict(GPT2(TINY).double(), theirs.state_dict())


def test_head_is_tied_and_counted_once() -> None:
    model = GPT2(TINY)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_initialisation_has_gpt2s_deviations() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(num_layers=2, num_heads=2, width=128, vocab_size=1000, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
            # The deviation of a sample of n normals is off by 1/sqrt(2n) of itself; four of those.
            assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel())), name


def test_future_tokens_do_not_matter() -> None:
    model = GPT2(TINY)
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    torch.testing.assert_close(model(tokens)[0, :8], model(changed)[0, :8])


def test_dropout_acts_in_training_only() -> None:
    model = GPT2(GPT2Config(2, 2, 16, 12, 50, dropout=0.5))
    tokens = torch.randint(0, 50, (1, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_generate_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    model, prompt = GPT2(TINY), torch.tensor([1, 2, 3])
    state = torch.get_rng_state()
    # 20 tokens reach past the context length of 12.
    one, two = (generate(model, prompt, 20, temperature=1.0, top_k=None, seed=5) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one[:3], prompt)
    assert len(one) == 23
    assert not torch.equal(one, generate(model, prompt, 20, temperature=1.0, top_k=None, seed=6))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_greedy_is_temperature_zero_and_top_one() -> None:
    model, prompt = GPT2(TINY), torch.tensor([1])
    greedy = generate(model, prompt, 8, temperature=0.0, top_k=None, seed=0)
    assert torch.equal(greedy, generate(model, prompt, 8, temperature=1.0, top_k=1, seed=3))
    model.eval()
    assert greedy[1] == model(prompt[None])[0, -1].argmax()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10, "num_heads": 4}, r"model.width \(10\).*num_heads \(4\).*nearest that fits is 8"),
        ({"num_layers": 0}, r"model.num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GPT2Config(**change)  # pyright: ignore[reportArgumentType]


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"13 tokens exceeds context_length \(12\)"):
        GPT2(TINY)(torch.zeros(1, 13, dtype=torch.long))
