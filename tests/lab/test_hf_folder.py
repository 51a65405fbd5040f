"""Export to Hugging Face and back, against transformers itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from mars_lab.cli import main
from mars_lab.data.tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, Tokenizer, TrainedTokenizer
from mars_lab.errors import InputError
from mars_lab.evaluation import hf_folder
from mars_lab.models.gpt2 import GPT2, GPT2Config
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch
from mars_lab.training.config import RunConfig
from mars_lab.training.run_folder import RunFolder
from tokenizers_at_hand import needs_gpt2

from .tiny_runs import assert_identical, flags

TEXTS = ["the union of states shall", "  two  spaces\n\nand\tlines 1999's I'LL", "naïve 日本語 🙂 \x00", ""]
OTHER_VALUES: dict[str, Any] = {
    "num_layers": 3,
    "num_heads": 4,
    "width": 32,
    "context_length": 24,
    "vocab_size": 301,
    "bias": True,
    "dropout": 0.2,
    "scale_attn_by_inverse_layer_idx": False,
    "loss_chunk_size": 0,
    "activation_checkpointing": True,
}
BASE = GPT2Config(num_layers=2, num_heads=2, width=16, context_length=16, vocab_size=300)


def shaken(config: GPT2Config) -> GPT2:
    """A model in which no two weights, norms and biases included, are alike, so that a mix-up shows."""
    torch.manual_seed(0)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def tokenizer(tiny: RunConfig) -> Tokenizer:
    return LanguageTask(tiny.language, 0).data.tokenizer


def theirs(path: Path) -> GPT2LMHeadModel:
    model = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model, GPT2LMHeadModel)
    return model


@pytest.mark.parametrize("option", [None, *(field.name for field in dataclasses.fields(GPT2Config))])
def test_logits_of_the_export_are_the_models(option: str | None, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With every option of the model changed: one that Hugging Face can't express would have to be refused."""
    config = BASE if option is None else dataclasses.replace(BASE, **{option: OTHER_VALUES[option]})
    model = shaken(config)
    hf_folder.write(tmp_path / "hf", model, tokenizer)
    tokens = torch.randint(0, config.vocab_size, (2, config.context_length))
    # fp32 carries 7 digits, the logits are up to 10, and the sums are taken in another order.
    torch.testing.assert_close(theirs(tmp_path / "hf")(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)

    folder = hf_folder.read(tmp_path / "hf")
    there_and_back = GPT2(folder.config)
    folder.load_into(there_and_back)
    assert_identical(dict(there_and_back.state_dict()), dict(model.state_dict()))
    in_memory = ("loss_chunk_size", "activation_checkpointing")  # not the model's, but the training's
    defaults = {name: getattr(GPT2Config(), name) for name in in_memory}
    assert folder.config == dataclasses.replace(config, **defaults)
    assert folder.vocabulary == tokenizer.as_hugging_face().get_vocab()


def test_the_export_generates_and_stops_at_the_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = shaken(dataclasses.replace(BASE, bias=True))
    with torch.no_grad():  # whatever came before, the end of the text is next
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(16)[0])
        model.transformer.wte.weight[:, 0] = torch.eye(300)[tokenizer.end_of_text]
    hf_folder.write(tmp_path / "hf", model, tokenizer)
    hf: Any = theirs(tmp_path / "hf")
    assert hf.generation_config.eos_token_id == hf.config.bos_token_id == tokenizer.end_of_text
    prompt = tokenizer.encode("the union of")
    out = hf.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.end_of_text)
    assert out.tolist() == [[*prompt, tokenizer.end_of_text]]


def assert_same_tokens(path: Path, ours: Tokenizer) -> None:
    hf = AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        assert hf(text)["input_ids"] == ours.encode(text), text
        assert hf.decode(hf(text)["input_ids"]) == text
    assert hf.eos_token_id == hf.bos_token_id == ours.end_of_text
    assert hf("<|endoftext|>")["input_ids"] == [ours.end_of_text]


def test_a_corpuss_tokenizer_goes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    hf_folder.write(tmp_path / "hf", GPT2(BASE), tokenizer)
    assert_same_tokens(tmp_path / "hf", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == BASE.context_length


@needs_gpt2
def test_gpt2s_tokenizer_goes_along_with_a_padded_vocabulary(tmp_path: Path) -> None:
    tokenizer = GPT2Tokenizer()
    model = GPT2(dataclasses.replace(BASE, vocab_size=50304))
    hf_folder.write(tmp_path / "hf", model, tokenizer)
    assert_same_tokens(tmp_path / "hf", tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == GPT2_VOCAB_SIZE
    assert theirs(tmp_path / "hf")(torch.tensor([[50303]])).logits.shape == (1, 1, 50304)
    vocabulary = json.loads((tmp_path / "hf" / "vocab.json").read_text())
    # From OpenAI's published vocab.json and merges.txt.
    assert [vocabulary[word] for word in ("!", "Ġthe", "Hello", "Ġgazed")] == [0, 262, 15496, 50255]
    assert (tmp_path / "hf" / "merges.txt").read_text().splitlines()[1:4] == ["Ġ t", "Ġ a", "h e"]


def model_of(path: Path) -> GPT2:
    run = RunFolder(path)
    return launch.load_model(run, launch.newest_checkpoint(run))[1]


def test_a_run_is_exported_and_imported_as_a_new_run_that_trains(
    tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, hf = ("--runs", str(tmp_path)), str(tmp_path / "hf")
    main(["train", *flags(tiny), "--name", "first", *runs])
    main(["export", hf, "first", "--to", "hf", *runs])
    model = model_of(tmp_path / "first")
    tokens = torch.randint(0, 300, (2, 16))
    torch.testing.assert_close(theirs(tmp_path / "hf")(tokens).logits, model.eval()(tokens), rtol=1e-5, atol=1e-5)

    data = ["--corpus", tiny.language.data.corpus, "--data.tokenizer-size", "300", "--data.val-fraction", "0.1"]
    data += ["--data.cache", tiny.language.data.cache]
    short = ["--train.num-steps", "2", "--train.batch-size", "2", "--eval-sequences", "8", "--train.precision", "fp32"]
    main(["import", hf, "second", *data, *short, *runs])
    assert_identical(dict(model_of(tmp_path / "second").state_dict()), dict(model.state_dict()))
    assert RunFolder(tmp_path / "second").config().task.model == tiny.language.model  # dropout, too

    main(["train", "--resume", "second", *runs])
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    first_loss = next(row["val_loss"] for row in rows if row["step"] == 0)
    last_loss = [row["val_loss"] for row in before if "val_loss" in row][-1]
    assert first_loss == pytest.approx(last_loss, rel=1e-6)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]

    checkpoint = sorted((tmp_path / "first" / "checkpoints").iterdir())[0]
    assert checkpoint.name == "step-00000010"
    main(["export", str(tmp_path / "hf10"), str(checkpoint), "--to", "hf", *runs])
    assert not torch.equal(
        load_file(tmp_path / "hf10" / "model.safetensors")["transformer.wte.weight"], model.transformer.wte.weight
    )
    assert "second begins with the weights of" in capsys.readouterr().out

    (checkpoint / "values.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "damaged"), str(checkpoint), "--to", "hf", *runs])
    assert "step-00000010 is damaged (the SHA-256 of values.pt" in capsys.readouterr().err


def test_another_vocabulary_than_the_datas_is_refused(
    tmp_path: Path, tiny: RunConfig, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_folder.write(tmp_path / "hf", GPT2(BASE), tokenizer)
    (tmp_path / "other.txt").write_text("entirely different words, with other letters in other orders " * 50)
    flags = ["--corpus", str(tmp_path / "other.txt"), "--data.tokenizer-size", "300"]
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(tmp_path / "hf"), *flags, "--data.cache", str(tmp_path / "d"), "--runs", str(tmp_path)])
    assert stopped.value.code == 2
    assert "isn't that of the data" in capsys.readouterr().err
    assert not (tmp_path / "hf-001").exists()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'; only 'gpt2'"),
        ({"scale_attn_weights": False}, r"scale_attn_weights is False"),
        ({"activation_function": "relu"}, r"activation_function is 'relu'.*'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon is 1e-06"),
        ({"n_inner": 60}, r"n_inner is 60.*None or 64"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings is False"),
        ({"attn_pdrop": 0.5}, r"one dropout rate.*'attn_pdrop': 0.5"),
    ],
)
def test_what_our_gpt2_cannot_be_is_refused_by_name(
    values: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    hf_folder.write(tmp_path / "hf", GPT2(BASE), tokenizer)
    change(tmp_path / "hf" / "config.json", **values)
    with pytest.raises(InputError, match=message):
        hf_folder.read(tmp_path / "hf")


def test_files_of_the_original_gpt2_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Names without the prefix, masks among the weights, no head, several files, 16 bits."""
    model = shaken(dataclasses.replace(BASE, bias=True))
    hf_folder.write(tmp_path / "hf", model, tokenizer)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state = {name.removeprefix("transformer."): value.bfloat16() for name, value in state.items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    names = sorted(state)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / "hf" / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "hf" / "model.safetensors").unlink()
    folder = hf_folder.read(tmp_path / "hf")
    assert folder.config.bias
    there_and_back = GPT2(folder.config)
    folder.load_into(there_and_back)
    expected = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    assert_identical(dict(there_and_back.state_dict()), expected)


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "hf"
    with pytest.raises(InputError, match=r"there is no .*config.json"):
        hf_folder.read(path)
    hf_folder.write(path, GPT2(BASE), tokenizer)
    with pytest.raises(InputError, match=r"hf is there already"):
        hf_folder.write(path, GPT2(BASE), tokenizer)
    with pytest.raises(InputError, match=r"hf: transformer.wte.weight has shape \(300, 16\), this model needs"):
        hf_folder.read(path).load_into(GPT2(dataclasses.replace(BASE, width=32)))

    state = load_file(path / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.zeros(300, 16)}, path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight isn't the token embedding"):
        hf_folder.read(path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        hf_folder.read(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors; older formats"):
        hf_folder.read(path)
    save_file(state, path / "model.safetensors")
    (path / "tokenizer.json").unlink()
    assert hf_folder.read(path).vocabulary == tokenizer.as_hugging_face().get_vocab()
    (path / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"neither tokenizer.json nor vocab.json"):
        hf_folder.read(path)


def test_exports_of_a_tokenizer_read_from_its_file_agree(tmp_path: Path, tokenizer: Tokenizer) -> None:
    hf_folder.write(tmp_path / "hf", GPT2(BASE), tokenizer)
    again = TrainedTokenizer.read(tmp_path / "hf" / "tokenizer.json")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
