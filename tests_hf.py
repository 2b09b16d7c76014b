"""Appended to test_stu.py: the Hugging Face bridge against the real libraries."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import prepare_data
import stu
from stu import FlashSTU
from test_stu import HERE, models, relative_error, seeded, small_config, small_model  # noqa: F401

# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def lively_model(**options):
    """Not trained, but its greedy text is no repetition of one token."""
    model = small_model(**options)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(2)
    return model


def load(hf, folder, **options):
    return hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    """The same model twice, ours and that of transformers, and its folder; vocabulary: bytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = lively_model(vocab_size=256, dropout=0.1)
    model.save_pretrained(folder)
    prepare_data.save_tokenizer(prepare_data.get_tokenizer("bytes"), folder)
    return model, load(hf, folder), folder


def padded(ids, lengths, pad=0):
    """Rows ids[i, -lengths[i]:] behind padding, and their attention_mask."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, pad), mask.long()


def test_importing_this_file_imports_nothing_of_hugging_face():
    code = "import sys; sys.modules['transformers'] = None; import stu; print(*sys.modules); stu."
    for name, message in (("FlashSTUForCausalLM", "pip install transformers"), ("Flash", "no attribute 'Flash'")):
        run = subprocess.run([sys.executable, "-c", code + name], cwd=HERE, capture_output=True, text=True)
        assert run.returncode and message in run.stderr
        assert not {"huggingface_hub", "tokenizers", "safetensors"} & set(run.stdout.split())


@models
def test_transformers_computes_what_we_compute(hf, options, tmp_path):
    model, ids = lively_model(**options), torch.randint(61, (2, 60))
    model.save_pretrained(tmp_path)
    theirs = load(hf, tmp_path)
    assert isinstance(theirs, hf.PreTrainedModel) and type(theirs).__module__.startswith("transformers_modules")
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    greedy = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=20, temperature=0))
    assert len(greedy[0, 60:].unique()) > 3
    theirs.save_pretrained(tmp_path / "theirs")
    again = FlashSTU.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)


@models
@torch.no_grad()
def test_left_padding_reaches_neither_state_nor_attention(hf, options):
    """... whatever stands there, in one piece and in two, and over the generation that follows."""
    model, ids, lengths = lively_model(**options), torch.randint(1, 61, (3, 40)), [40, 7, 25]
    theirs = stu.FlashSTUForCausalLM(stu.FlashSTUPretrainedConfig(**model.config.to_dict())).eval()
    theirs.model.load_state_dict(model.state_dict())
    x, mask = padded(ids, lengths)
    logits = theirs(x, attention_mask=mask).logits
    noise = torch.where(mask == 1, x, torch.randint(61, x.shape))
    assert torch.equal(theirs(noise, attention_mask=mask).logits * mask[..., None], logits * mask[..., None])
    first = theirs(x[:, :20], attention_mask=mask[:, :20], use_cache=True)
    second = theirs(x[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
    in_two = torch.cat([first.logits, second.logits], 1)
    assert relative_error(in_two * mask[..., None], logits * mask[..., None]) < 1e-5
    text = theirs.generate(x, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, -n:]
        assert relative_error(logits[row, -n:], model(alone).logits[0]) < 1e-5
        assert torch.equal(text[row, 40 - n :], model.generate(alone, max_new_tokens=15, temperature=0)[0])


def test_only_padding_that_is_seen_costs_the_fast_route(hf, saved, monkeypatch):
    masks = []
    monkeypatch.setattr(stu.FlashSTU, "hidden", lambda self, ids, state, use_cache, mask, trace: masks.append(mask) or
                        (torch.zeros(*ids.shape, 32), []))  # fmt: skip
    model = stu.FlashSTUForCausalLM(stu.FlashSTUPretrainedConfig(**small_config().to_dict()))
    ids, (_, left) = torch.ones(2, 6, dtype=torch.long), padded(torch.ones(2, 6), [6, 3])
    right, none = left.flip(1), torch.ones_like(left)
    for mask, cached, needed in ((none, True, False), (right, False, False), (right, True, True), (left, False, True)):
        model(ids, attention_mask=mask, use_cache=cached)
        assert (masks.pop() is not None) == needed
    attention, x = stu.SlidingWindowAttention(32, 2, 4).bfloat16(), torch.randn(2, 6, 32).bfloat16()
    expected = attention(x, attention_mask=left)
    monkeypatch.setattr(stu, "on_cuda", lambda t: True)
    monkeypatch.setattr(stu, "flash_attn_func", lambda *_, **__: pytest.fail("flash-attn knows no padding"))
    assert torch.equal(attention(x, attention_mask=left), expected)
    with pytest.raises(ValueError, match=r"must be \[2, 6\], got \[2, 5\]"):
        model(ids, attention_mask=left[:, 1:])


def test_generation_of_transformers_on_our_state(hf, saved):
    model, theirs, folder = saved
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer(["def f(x):", "import"], padding=True, return_tensors="pt")
    greedy = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(theirs.generate(**prompt, max_new_tokens=24, do_sample=True, top_k=1), greedy)
    assert torch.equal(theirs.generate(**prompt, max_new_tokens=24, do_sample=False, use_cache=False), greedy)
    beams = [theirs.generate(**prompt, max_new_tokens=12, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams) and beams[0].shape[1] > 10  # the state is reordered as the beams are
    hf.set_seed(1)
    samples = theirs.generate(**prompt, max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert samples.shape[0] == 6 and len({tuple(row) for row in samples.tolist()}) == 6
    one = tokenizer("def f(x):", return_tensors="pt")
    text = theirs.generate(**one, max_new_tokens=24, do_sample=False)
    shown = []
    streamer = hf.TextStreamer(tokenizer)
    streamer.on_finalized_text = lambda piece, stream_end=False: shown.append(piece)
    theirs.generate(**one, max_new_tokens=24, do_sample=False, streamer=streamer)
    assert len(shown) > 1 and "".join(shown) == tokenizer.decode(text[0])
    new = text[0, 9:].tolist()
    stop = next(bytes([b]).decode("ascii") for b in new[4:] if 32 < b < 127)
    stopped = theirs.generate(**one, max_new_tokens=24, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped[0, -1] == ord(stop) and stopped.shape[1] == 9 + new.index(ord(stop)) + 1
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(**one, assistant_model=copy.copy(theirs))


def test_outputs_of_the_transformers_class(hf, saved):
    model, theirs, _ = saved
    ids = torch.randint(256, (2, 30))
    labels = ids.clone()
    labels[0, :10] = -100
    out = theirs(ids, labels=labels, output_hidden_states=True, use_cache=True)
    assert torch.allclose(out.loss, model(ids, labels=labels).loss)
    assert torch.allclose(out.logits, model(ids).logits, atol=1e-5)
    assert len(out.hidden_states) == 5 and torch.equal(out.hidden_states[0], theirs.get_input_embeddings()(ids))
    assert torch.equal(model.head(out.hidden_states[-1]), out.logits)
    assert theirs(ids).past_key_values is None and out.past_key_values.get_seq_length() == 30
    tuples = theirs(ids, labels=labels, return_dict=False)
    assert isinstance(tuples, tuple) and len(tuples) == 2 and torch.equal(tuples[1], theirs(ids).logits)
    token = torch.randint(256, (2, 1))
    step = theirs(token, past_key_values=out.past_key_values)
    assert relative_error(step.logits[:, -1], model(torch.cat([ids, token], 1)).logits[:, -1]) < 1e-5
    with pytest.raises(ValueError, match="input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_that_of_the_checkpoint_or_the_one_asked_for(hf, saved, dtype):
    model, theirs, folder = saved
    assert theirs.dtype == torch.float32
    ids, dtype = torch.randint(256, (1, 20)), getattr(torch, dtype)
    other = load(hf, folder, dtype=dtype)
    mixer = other.model.layers[0].mixer
    assert other.dtype == dtype and torch.equal(other(ids).logits, copy.deepcopy(model).to(dtype)(ids).logits)
    assert mixer.filters.dtype == torch.promote_types(dtype, torch.float32)  # never below float32
    made = hf.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True, dtype=dtype)
    mixer, fresh = made.model.layers[0].mixer, FlashSTU(model.config).layers[0].mixer  # initialised as FlashSTU does
    assert made.dtype == dtype and 0.8 < mixer.M_filters.std() / fresh.M_filters.std() < 1.25


def test_resized_embeddings_come_back_from_shards(hf, saved, tmp_path):
    _, theirs, folder = saved
    model, ids = copy.deepcopy(theirs), torch.randint(256, (2, 20))
    before = model(ids).logits
    model.resize_token_embeddings(300)
    assert torch.equal(model(ids).logits[..., :256], before)
    assert model(ids + 44, labels=ids + 44).logits.shape[-1] == 300
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for again in (load(hf, tmp_path), FlashSTU.from_pretrained(tmp_path).eval()):
        assert torch.equal(again(ids).logits, model(ids).logits)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="does not fit"):
        FlashSTU.from_pretrained(tmp_path)


def test_a_saved_folder_is_ready_for_the_hub(hf, saved, tmp_path):
    folder = saved[2]
    stu.FlashSTUForCausalLM(stu.FlashSTUPretrainedConfig(**small_config().to_dict())).save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        config = json.loads((place / "config.json").read_text())
        assert config["auto_map"] == stu.HF_CONFIG["auto_map"] and config["architectures"] == ["FlashSTUForCausalLM"]
        assert (place / "stu.py").read_bytes() == (HERE / "stu.py").read_bytes()
        assert hf.GenerationConfig.from_pretrained(place).eos_token_id == (0 if place == folder else None)
        config = hf.AutoConfig.from_pretrained(place, trust_remote_code=True)
        assert config.hidden_size == 32 and config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="n_heads = 5 does not divide"):
        stu.FlashSTUPretrainedConfig(n_embd=32, n_heads=5)


def test_gradient_checkpointing_through_their_switch_changes_no_gradient(hf, saved):
    model, ids = copy.deepcopy(saved[1]).train(), torch.randint(256, (2, 40))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ran, gradients = [], []
    model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    for switch in (lambda: None, model.activation_checkpointing_enable, model.activation_checkpointing_disable):
        switch()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        ran.append(0)
    assert ran == [1, 0, 1, 1, 0, 1, 0]  # computed a second time only between the two
    for one in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(one, gradients[0]))


def text_rows(n=24, length=40):
    line = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))
    return [{"input_ids": (row := line[i : i + length]), "labels": row} for i in range(n)]


def test_their_trainer_trains_it_and_we_load_the_result(hf, saved, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    model = copy.deepcopy(saved[1])
    args = hf.TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(model, args, train_dataset=text_rows())
    trainer.train()
    curve = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert curve[-1] < 0.7 * curve[0]
    trainer.save_model(tmp_path / "trained")
    ids = text_rows(1)[0]["input_ids"][None]
    ours = FlashSTU.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(ours(ids).logits, model.eval()(ids).logits)


def test_lora_attaches_to_the_linear_layers_and_merges(hf, saved):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base, ids = copy.deepcopy(saved[1]), text_rows(1)[0]["input_ids"][None]
    names = ["c_attn", "c_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * 3 + 2 * 2
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        merged = model.merge_and_unload()
        assert relative_error(merged(ids).logits, expected) < 1e-5
        assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), text)


def test_a_saved_tokenizer_has_our_tokens_and_the_pipeline_writes(hf, saved, tmp_path):
    model, _, folder = saved
    text = "héllo  wörld's\n\tdef f(x):  1234 日本 \x7f"
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    for piece in (b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"  ", b"12"):
        ranks[piece] = len(ranks)
    # as in o200k_base, the end of text does not directly follow the ranks
    tiny = prepare_data.TiktokenTokenizer.__new__(prepare_data.TiktokenTokenizer)
    pattern = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 280}
    tiny.encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tiny.eot = 280
    prepare_data.save_tokenizer(tiny, tmp_path)
    for ours, place in ((tiny, tmp_path), (prepare_data.get_tokenizer("bytes"), folder)):
        theirs = hf.AutoTokenizer.from_pretrained(place, trust_remote_code=place == folder)
        for t in (text, "the thing in the  thesis 12345", ""):
            assert theirs(t).input_ids == ours.encode(t).tolist() and theirs.decode(theirs(t).input_ids) == t
        assert theirs.eos_token_id == ours.eot and theirs("<|endoftext|>").input_ids == [ours.eot]
    pipe = hf.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    for prompts in (["def f", "import torch"],):  # two lengths in one batch
        for prompt, (answer,) in zip(prompts, pipe(prompts, batch_size=2, max_new_tokens=12, do_sample=False)):
            ids = torch.tensor([list(prompt.encode())])
            expected = model.generate(ids, max_new_tokens=12, temperature=0, stop_token=0)[0].tolist()
            assert answer["generated_text"] == bytes(b for b in expected if b).decode(errors="replace")


def test_lm_eval_measures_our_likelihoods(hf, saved, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, _, folder = saved
    asked = ["Is 1 odd?", "Is 2?", "Is the sky green?"]
    questions = [{"q": q, "choices": ["yes", "no!"], "label": i % 2} for i, q in enumerate(asked)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "t.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
    lm = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    correct = 0
    for q, sample in zip(questions, sorted(results["samples"]["tiny"], key=lambda s: s["doc_id"])):
        scores = []
        for choice in q["choices"]:
            prompt, ids = len(f"{q['q']} Answer:"), torch.tensor([list(f"{q['q']} Answer: {choice}".encode())])
            log_p = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, prompt - 1 :]
            scores.append(log_p.sum().item())
        assert [r[0][0] for r in sample["resps"]] == pytest.approx(scores, rel=1e-4)
        correct += scores.index(max(scores)) == q["label"]
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(correct / 3)
