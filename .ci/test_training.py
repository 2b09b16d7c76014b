"""Training with transformers, peft and trl; the saved tokenizer; lm_eval. One behaviour a test."""

import copy
import json

import pytest
import torch
import transformers
from conftest import REPOSITORY, load, load_tokenizer, random_ids, relative_error

import prepare_data
from stu import FlashSTU


def text_rows():
    line = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))
    return [{"input_ids": line[i : i + 40], "labels": line[i : i + 40]} for i in range(24)]


# ---- Training ------------------------------------------------------------------------------------


def trainer_of(model, folder, **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        folder, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **options
    )
    return transformers.Trainer(
        model, arguments, train_dataset=text_rows(), eval_dataset=text_rows()
    )


def losses(trainer):
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


def lora(peft, **options):
    """For every matrix: those of the STU are parameters, not linear layers."""
    stu_matrices = ["mixer.M_inputs", "mixer.M_filters"]
    options |= {"target_modules": "all-linear", "target_parameters": stu_matrices}
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


def test_their_trainer_trains_it_and_we_load_the_result(pair, tmp_path):
    _, theirs = pair
    options = {"max_steps": 12, "learning_rate": 1e-2, "gradient_checkpointing": True}
    trainer = trainer_of(theirs, tmp_path / "run", gradient_accumulation_steps=2, **options)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "run")
    ids = random_ids(1, 20)
    ours = FlashSTU.from_pretrained(tmp_path / "run")
    assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)


def test_their_switch_for_gradient_checkpointing_changes_no_gradient(pair):
    _, theirs = pair
    ids = random_ids(2, 40)
    calls = []
    theirs.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    theirs(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in theirs.parameters()]
    theirs.zero_grad()
    theirs.gradient_checkpointing_enable()
    theirs.train()
    theirs(ids, labels=ids).loss.backward()
    assert len(calls) == 3  # once without, twice with it
    for p, gradient in zip(theirs.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-7)


@pytest.mark.parametrize("with_lora", [False, True])
def test_smoothed_labels_are_shifted(pair, tmp_path, with_lora):
    _, theirs = pair
    row = text_rows()[0]
    batch = {name: ids[None] for name, ids in row.items()}
    expected = theirs(**batch).loss
    if with_lora:
        peft = pytest.importorskip("peft")
        theirs = peft.get_peft_model(theirs, lora(peft))
    trainer = trainer_of(theirs, tmp_path / "run", label_smoothing_factor=1e-9)
    assert torch.allclose(trainer.compute_loss(theirs, batch), expected)


def test_lora_reaches_every_matrix_and_merges(pair):
    peft = pytest.importorskip("peft")
    ids = text_rows()[0]["input_ids"][None]
    model = peft.get_peft_model(pair[1], lora(peft))
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    assert adapted == 4 * 3 + 2 * 2 + 2 * 2  # MLPs, attention, STU
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0]
    expected = model.eval()(input_ids=ids).logits
    assert relative_error(model.merge_and_unload()(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_output_matrix_loads_if_it_is_still_the_embedding(pair, tmp_path, tied):
    peft = pytest.importorskip("peft")
    config = lora(peft, modules_to_save=["lm_head"], ensure_weight_tying=tied)
    model = peft.get_peft_model(pair[1], config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ids = random_ids(1, 20)
    assert torch.equal(load(tmp_path / "merged")(ids).logits, merged.eval()(ids).logits)
    if tied:
        ours = FlashSTU.from_pretrained(tmp_path / "merged")
        assert torch.equal(ours(ids).logits, merged(ids).logits)
    else:
        with pytest.raises(ValueError, match="lm_head.weight"):
            FlashSTU.from_pretrained(tmp_path / "merged")


TEXTS = ["the quick brown fox jumps over the lazy dog. " * n for n in (1, 2, 1, 1)] * 6
PAIRS = [{"prompt": "the quick ", "chosen": "brown fox", "rejected": "zzz"}] * 24


def train_with_trl(kind, model, rows, folder, arguments, **options):
    """The trainer, after a few steps, and the folder with what it has saved."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "trust_remote_code": True,
    } | arguments
    config = getattr(trl, f"{kind}Config")(str(folder), **arguments)
    data = Dataset.from_list(rows)
    trainer = getattr(trl, f"{kind}Trainer")(model, args=config, train_dataset=data, **options)
    trainer.train()
    trainer.save_model(folder)
    return trainer


@pytest.mark.parametrize("kind", ["SFT", "packed SFT", "LoRA SFT", "DPO"])
def test_trl_trains_it(pair, tmp_path, kind):
    rows = [{"text": text} for text in TEXTS]
    arguments, options = {}, {}
    if kind == "DPO":
        rows = PAIRS
    if kind == "packed SFT":
        arguments = {"packing": True, "max_length": 100}
    if kind == "LoRA SFT":
        options = {"peft_config": lora(pytest.importorskip("peft"))}
    name = kind.split()[-1]
    trainer = train_with_trl(name, pair[1], rows, tmp_path / "run", arguments, **options)
    assert losses(trainer)[-1] < 0.99 * losses(trainer)[0]


def test_trl_trains_it_by_reward(pair, tmp_path):
    def reward(completions, **_):
        return [float(len(set(text))) for text in completions]

    before = copy.deepcopy(pair[1])
    rows = [{"prompt": text} for text in TEXTS]
    arguments = {"max_steps": 2, "num_generations": 4, "max_completion_length": 8}
    options = {"reward_funcs": reward}
    train_with_trl("GRPO", pair[1], rows, tmp_path / "run", arguments, **options)
    for p, q in zip(pair[1].parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)


def test_what_trl_saves_is_whole(pair, tmp_path):
    rows = [{"text": text} for text in TEXTS]
    train_with_trl("SFT", str(tmp_path / "model"), rows, tmp_path / "run", {})
    ids = torch.tensor([load_tokenizer(tmp_path / "run")("abc").input_ids])
    ours = FlashSTU.from_pretrained(tmp_path / "run")
    assert torch.equal(ours(ids).logits, load(tmp_path / "run")(ids).logits)


# ---- The classifier of docs/huggingface.md -------------------------------------------------------


@pytest.fixture
def classifier(pair, tmp_path):
    page = (REPOSITORY / "docs" / "huggingface.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "class FlashSTUForSequenceClassification" in block]
    names = {}
    exec(code, names)  # noqa: S102
    return names["FlashSTUForSequenceClassification"]


def test_the_classifier_reads_the_last_token_that_is_no_padding(classifier, tmp_path):
    model = classifier.from_pretrained(tmp_path / "model", num_labels=3)
    ids = random_ids(2, 20)
    padding = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    left = model(torch.cat([padding, ids], dim=1), attention_mask=mask)
    right = model(torch.cat([ids, padding], dim=1), attention_mask=mask.flip(1))
    alone = model(ids, labels=torch.tensor([0, 2]))
    assert alone.logits.shape == (2, 3) and alone.loss > 0
    assert relative_error(left.logits, alone.logits) < 1e-5
    assert relative_error(right.logits, alone.logits) < 1e-5


def test_the_classifier_learns_a_reward(classifier, tmp_path):
    model = classifier.from_pretrained(tmp_path / "model", num_labels=1)
    trainer = train_with_trl("Reward", model, PAIRS, tmp_path / "run", {})
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    again = classifier.from_pretrained(tmp_path / "run")
    ids = random_ids(1, 20)
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


# ---- Tokenizer and evaluation --------------------------------------------------------------------


def tiny_tiktoken():
    """As o200k_base, its end of text does not directly follow the ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    for piece in (b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"  ", b"12"):
        ranks[piece] = len(ranks)
    pattern = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = prepare_data.TiktokenTokenizer.__new__(prepare_data.TiktokenTokenizer)
    tokenizer.encoding = tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 280}
    )
    tokenizer.eot = 280
    return tokenizer


@pytest.fixture(params=["bytes", "tiktoken"])
def tokenizers(request, tmp_path):
    """A tokenizer of prepare_data.py, and the same as transformers loads it."""
    ours = prepare_data.get_tokenizer("bytes") if request.param == "bytes" else tiny_tiktoken()
    prepare_data.save_tokenizer(ours, tmp_path)
    return ours, load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["héllo  wörld's\n\tdef f(x):  1234 日本 \x7f", "the thing in the  thesis 12345", ""]
)
def test_a_saved_tokenizer_has_our_tokens(tokenizers, text):
    ours, theirs = tokenizers
    assert theirs(text).input_ids == ours.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text


def test_special_tokens_are_read_in_a_text_unless_one_asks_for_their_letters(tokenizers):
    ours, theirs = tokenizers
    text = "a<|endoftext|>"
    assert theirs(text).input_ids[-1] == ours.eot == theirs.eos_token_id
    letters = theirs(text, split_special_tokens=True).input_ids
    assert letters == ours.encode(text).tolist()


def test_padding_is_on_the_right_and_no_end_of_text(tokenizers):
    """So that a model learns the first token, and the end."""
    ours, theirs = tokenizers
    every_letter = "".join(map(chr, range(1, 0xD800)))
    assert theirs.pad_token_id not in (ours.eot, *ours.encode(every_letter))
    batch = theirs(["a", "bc <|endoftext|>"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, :2].tolist() == [1, 0]
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)
    assert collate([{"input_ids": batch.input_ids[1]}])["labels"][0, -1] == ours.eot


def test_generation_ends_at_the_end_of_a_text(tokenizers, tmp_path):
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.eos_token_id == tokenizers[0].eot


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}} Answer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_lm_eval_measures_our_likelihoods(pair, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = ["Is 1 odd?", "Is 2?", "Is the sky green?"]
    lines = [json.dumps({"q": q, "choices": ["yes", "no!"], "label": 0}) for q in questions]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    lm = HFLM(str(tmp_path / "model"), trust_remote_code=True, device="cpu", dtype="float32")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"task_manager": tasks, "bootstrap_iters": 0, "log_samples": True}
    samples = lm_eval.simple_evaluate(lm, tasks=["tiny"], **options)["samples"]["tiny"]
    for question, sample in zip(questions, sorted(samples, key=lambda s: s["doc_id"]), strict=True):
        for choice, response in zip(["yes", "no!"], sample["resps"], strict=True):
            prompt = f"{question} Answer:"
            ids = torch.tensor([list(f"{prompt} {choice}".encode())])
            log_p = pair[0](ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])
            assert response[0][0] == pytest.approx(
                log_p[0, len(prompt) - 1 :].sum().item(), rel=1e-4
            )
