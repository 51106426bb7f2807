"""`steer` applies to exactly the calls that are meant, with the right values, or raises."""

import asyncio
import contextvars
import copy
import pickle
import threading
from inspect import signature

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
    TextIteratorStreamer,
)

import empcause
from faults.kinds import Guard, fault

STEERING = "empcause/integration/steering.py"
ATTENTION = "empcause/integration/attention.py"
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
LLAMA = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **SPECIAL,
)
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaModel.forward).parameters)
NEW = {"max_new_tokens": 6, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread")


def make(config=LLAMA) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="empcause").eval()
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform attention, so that causes change the answers
    model.generation_config.eos_token_id = None
    return model


def prompts(rows=2, tokens=9):
    """Return random token ids, and causes large enough to change the answers."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(3, 60, (rows, tokens), generator=generator)
    return ids, torch.rand(rows, tokens, generator=generator) * 5 - 0.9


def logits(model, ids, causes, **kwargs):
    """Return the logits with the causes of the first keys passed to the attention layers directly, without `steer`."""
    return model(ids, cause_probs=causes, **kwargs).logits


def greedy(model, ids, causes, steps=6):
    """Return the ids continued by greedy generation, step by step and without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, ids, causes)[:, -1:].argmax(-1)], 1)
    return ids


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Adapter(nn.Module):
    """A wrapper that calls the inner model's `forward` instead of its `__call__`, as LoRA does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@fault(
    Guard(STEERING, "for module in model.modules():", "for module in (model,):"),
    Guard(STEERING, '_replaced(decoder, "forward", _forward)', '_replaced(model, "forward", _forward)'),
    cause="a wrapper calls the inner model past the model that is steered: LoRA, DistributedDataParallel, a base model",
    place="steer(wrapper, ...) and steer(inner, ...)",
    promise="calls of the wrapper, of what is inside, and their generate are steered, all with the same values",
)
def test_wrappers():
    for config in (GPT2, LLAMA):
        inner = make(config)
        outer = Adapter(Adapter(inner))
        ids, causes = prompts()
        expected, answer = logits(inner, ids, causes), greedy(inner, ids, causes)
        hidden = inner.base_model(ids, cause_probs=causes)[0]
        assert not torch.equal(answer, greedy(inner, ids, causes * 0))
        for steered in (outer, inner):
            with torch.no_grad(), empcause.steer(steered, causes):
                for called in (outer, inner):
                    close(called(ids).logits, expected)
                    assert torch.equal(called.generate(ids, **NEW), answer)
                close(inner.base_model(ids)[0], hidden)
    with pytest.raises(ValueError, match="holds 2 models"), empcause.steer(nn.ModuleList([make(), make()]), causes):
        pass


@fault(
    Guard(
        STEERING, "            setattr(module, name, method)\n", "            module.register_forward_pre_hook(print)\n"
    ),
    cause="the model was compiled before it is steered",
    place="torch.compile(model) or model.compile(), then steer",
    promise="calls inside are steered and calls after are not, whatever was compiled when",
)
def test_compiled_models():
    ids, causes = prompts()
    for inside in (False, True):
        torch._dynamo.reset()
        model = make(LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 1}))
        plain, expected, answer = model(ids).logits, logits(model, ids, causes), greedy(model, ids, causes, 2)
        compiled = model if inside else torch.compile(model, backend="eager")
        if inside:
            model.compile(backend="eager")
        with torch.no_grad():
            close(compiled(ids).logits, plain)
            with empcause.steer(compiled, causes):
                close(compiled(ids).logits, expected)
                assert torch.equal(compiled.generate(ids, max_new_tokens=2, do_sample=False), answer)
            with empcause.steer(model, causes * 0):
                close(compiled(ids).logits, plain)
            close(compiled(ids).logits, plain)


class Letters:
    """A tokenizer that a streamer can use."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(token)} " for token in ids)


def read(model, ids, target, *leading):
    """Call `target(*leading, ids, ...)` in a thread, and return the tokens that it streams."""
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=20)
    thread = threading.Thread(target=target, args=(*leading, ids), kwargs={"streamer": streamer, **NEW})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return [int(token) for token in text.split()]


@fault(
    Guard(STEERING, "if not self.holders:", "if not self.holders or not _STEERINGS.get():"),
    Guard(STEERING, '            kwargs["streamer"].end()', "            pass"),
    cause="Thread(target=model.generate) with a streamer, started while the model is steered",
    place="a thread that does not inherit the context",
    promise="it raises and names what inherits the context, its streamer ends, and what it names gives the steered answer",
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_outside_the_context(monkeypatch):
    model = make()
    ids, causes = prompts(rows=1)
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append(hook.exc_value))

    def outside():
        with empcause.steer(model, causes):
            assert read(model, ids, model.generate) == []
            thread = threading.Thread(target=model, args=(ids,))
            thread.start()
            thread.join()

    with pytest.raises(RuntimeError, match="Nothing was steered"):
        outside()
    assert len(raised) == 2
    assert all("contextvars.copy_context().run" in str(error) for error in raised)
    with empcause.steer(model, causes):
        answer = read(model, ids, contextvars.copy_context().run, model.generate)
    assert answer == greedy(model, ids, causes)[0, 9:].tolist()
    assert read(model, ids, model.generate) == greedy(model, ids, causes * 0)[0, 9:].tolist()


@fault(
    Guard(
        STEERING, "            if not method.holders:\n                del", "            if True:\n                del"
    ),
    Guard(STEERING, "_STEERINGS.set((*_STEERINGS.get(), steering))", "_STEERINGS.set((steering,))"),
    cause="two threads, two tasks, or two models in one thread are steered at once, each with causes of its own",
    place="steer",
    promise="each gets the answer of its own causes, also when another's context has ended in between",
)
def test_several_threads_and_tasks():
    model = make()
    ids, causes = prompts(rows=2)
    rows = [causes[:1], causes[1:]]
    expected = [logits(model, ids[:1], row) for row in rows]
    entered, ended = threading.Barrier(2), threading.Event()
    found = {}

    def work(index):
        with torch.no_grad(), empcause.steer(model, rows[index]):
            entered.wait(20)
            found[index, "both"] = model(ids[:1]).logits
            if index:
                ended.wait(20)
                found[index, "alone"] = model(ids[:1]).logits
        ended.set()

    async def task(index, others):
        with empcause.steer(model, rows[index]):
            await asyncio.sleep(0)
            found[index, "task"] = model(ids[:1]).logits
            found[index, "started inside"] = await asyncio.create_task(call())
            await others.wait()

    async def call():
        return model(ids[:1]).logits

    async def tasks():
        others = asyncio.Barrier(3)
        running = [asyncio.create_task(task(index, others)) for index in (0, 1)]
        for _ in range(5):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another thread or task"):
            await asyncio.create_task(call())
        await others.wait()
        await asyncio.gather(*running)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(tasks())
    other = make(GPT2)
    with empcause.steer(model, rows[0]), empcause.steer(other, rows[1]):
        other(ids[:1])
        found[0, "beside another model"] = model(ids[:1]).logits
    assert len(found) == 8
    for (index, _), value in found.items():
        close(value, expected[index])
    close(model(ids[:1]).logits, logits(model, ids[:1], rows[0] * 0))


@fault(
    Guard(STEERING, "with _replaced_methods(steering.model, steering.decoder):  #", "with ExitStack():  #"),
    cause="the context ends while generate is still running in a thread that inherited it",
    place="generate, between two steps",
    promise="the answer is steered to its end",
)
def test_the_context_ends_before_generate():
    model = make()
    ids, causes = prompts(rows=1)
    started, ended = threading.Event(), threading.Event()
    found = []

    def wait(scores_of, scores):
        started.set()
        ended.wait(20)
        return scores

    def work():
        found.append(model.generate(ids, logits_processor=[wait], **NEW))

    with empcause.steer(model, causes):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
        started.wait(20)
    ended.set()
    thread.join()
    assert torch.equal(found[0], greedy(model, ids, causes))
    assert not {"forward", "generate"} & (vars(model).keys() | vars(model.model).keys())


@fault(
    Guard(STEERING, "_fit(self.causes, start, ranges)", "_fit(self.causes, 0, ranges)"),
    Guard(STEERING, "_fit(self.causes, self.start, ranges)", "_fit(self.causes, 0, ranges)"),
    Guard(STEERING, "if start is None or past <= start:", "if start is None:"),
    cause="keys precede the input: the cache has been filled before",
    place="calls of the model, and generate, with the whole conversation or the new tokens alone",
    promise="keys before have 0, tokens of the input their values, tokens read later through the same cache 0",
)
def test_keys_before_the_input():
    model = make()
    ids, causes = prompts(tokens=12)
    before, own = ids[:, :5], causes[:, 5:]
    shifted = nn.functional.pad(own, (5, 0))

    def filled(kind):
        cache = StaticCache(config=LLAMA, max_cache_len=40) if kind == "static" else DynamicCache(config=LLAMA)
        model(before, **{CACHE: cache})
        return cache

    def by_hand(ids, keys_causes):  # the keys before were computed without causes
        cache = filled("dynamic")
        out = logits(model, ids[:, 5:], keys_causes, **{CACHE: cache})
        tokens = [out[:, -1:].argmax(-1)]
        for _ in range(5):
            out = torch.cat([out, logits(model, tokens[-1], keys_causes, **{CACHE: cache})], 1)
            tokens.append(out[:, -1:].argmax(-1))
        return out, torch.cat([ids, *tokens], 1)

    mask = torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad():
        expected, answer = by_hand(ids, shifted)
        alone = logits(model, ids[:, 5:], own)
        for kind in ("dynamic", "static"):
            cache = filled(kind)
            conversation = filled(kind)
            with empcause.steer(model, own):
                found = [model(ids[:, 5:], **{CACHE: cache}).logits]
                for step in range(12, 17):
                    found.append(model(answer[:, step : step + 1], **{CACHE: cache}).logits)
                close(torch.cat(found, 1), expected)
                cache.reset()
                close(model(ids[:, 5:], **{CACHE: cache}).logits, alone)
                new = model.generate(ids[:, 5:], attention_mask=mask, **{CACHE: conversation}, **NEW)
                assert torch.equal(new[:, 7:], answer[:, 12:])
        whole, conversation, another = by_hand(ids, causes)[1], filled("static"), filled("dynamic")
        with empcause.steer(model, causes):
            assert torch.equal(model.generate(ids, attention_mask=mask, **{CACHE: conversation}, **NEW), whole)
            with pytest.raises(ValueError, match="prefill_chunk_size with a filled cache"):
                model.generate(ids, **{CACHE: another}, prefill_chunk_size=3, **NEW)
    assert not torch.equal(whole, answer)


@fault(
    Guard(STEERING, "        causes, start = causes[:, first - start :], first\n", "        start = first\n"),
    Guard(ATTENTION, "cause_probs[:, first : first + keys]", "cause_probs[:, :keys]"),
    cause="a sliding window: the cache drops the oldest keys of all layers, or of some",
    place="generate beyond the window",
    promise="causes stay with their keys: the answer of a cache that keeps all keys, which the mask then hides",
)
@pytest.mark.parametrize(
    "kinds", [["sliding_attention"] * 2, ["sliding_attention", "full_attention"]], ids=["all", "some"]
)
def test_keys_that_a_sliding_window_drops(kinds):
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=12,
        use_sliding_window=True,
        layer_types=kinds,
        **SPECIAL,
    )
    model = make(config)
    ids, causes = prompts()
    with empcause.steer(model, causes):
        expected = model.generate(ids, **NEW | {"max_new_tokens": 20}, **{CACHE: DynamicCache()})
        for options in ({}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, **NEW | {"max_new_tokens": 20}, **options), expected)


@fault(
    Guard(ATTENTION, "    if keys not in witness.ranges:", "    if False:"),
    Guard(STEERING, "if cache is not None and not isinstance(cache, Cache):", "if False:"),
    cause="keys precede the input in a way of the model's own, or in a cache that does not tell their number",
    place="a call of the model",
    promise="the call is refused",
)
def test_keys_of_unknown_number(monkeypatch):
    model = make()
    ids, causes = prompts()
    original = empcause.integration.empcause_attention

    def with_a_memory(module, query, key, value, mask, **kwargs):
        key, value = (nn.functional.pad(states, (0, 0, 3, 0)) for states in (key, value))
        return original(module, query, key, value, mask, **kwargs)

    class Opaque:
        """A cache that is not a transformers `Cache`."""

        def get_seq_length(self):
            return 0

    with pytest.raises(ValueError, match="cache of type Opaque"), empcause.steer(model.model, causes):
        model.model(ids, **{CACHE: Opaque()})
    AttentionInterface.register("empcause", with_a_memory)
    try:
        with pytest.raises(RuntimeError, match="attends to 12 keys where"), empcause.steer(model, causes):
            model(ids)
        with pytest.raises(RuntimeError, match="attends to 12 keys where"), empcause.steer(model, causes):
            model.generate(ids, **NEW)
    finally:
        AttentionInterface.register("empcause", original)


@fault(
    Guard(STEERING, "self.causes.shape[0] not in (1, rows) or self.causes.shape[1] != tokens", "False"),
    Guard(STEERING, "        self.steering.check_input(rows, self.tokens)\n", ""),
    cause="too few causes, too many, or two rows of them for four prompts",
    place="calls of the model, and generate",
    promise="refused with both shapes before anything is computed; the right number, or one row for all, is taken",
)
def test_rows_and_tokens_that_do_not_match():
    model = make()
    ids, causes = prompts(rows=4)
    for wrong in (causes[:2], causes[:3], causes[:, 1:], nn.functional.pad(causes, (0, 1))):
        for call in (model, model.generate, lambda ids: model.generate(ids, num_beams=2)):
            with pytest.raises(ValueError, match=r"but the input is \[4, 9\]"), empcause.steer(model, wrong):
                call(ids)
    with empcause.steer(model, causes[:1]):
        found = model(ids)
    close(found.logits, logits(model, ids, causes[:1].expand(4, -1)))
    with empcause.steer(model, causes[:2]):
        cache = model(ids[:2])[CACHE]
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="but the input is"):
            model(ids[:, :1], **{CACHE: cache})


@fault(
    Guard(STEERING, "causes.repeat_interleave(size, dim=0)", "causes.repeat(size, 1)"),
    cause="generate repeats its prompts: beams, several answers per prompt",
    place="generate",
    promise="every row has its own prompt's causes, so that each prompt's answers are those it gets alone",
)
def test_repeated_prompts():
    model = make()
    ids, causes = prompts(rows=2)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}):
        with empcause.steer(model, causes):
            together = model.generate(ids, **NEW, **options)
        alone = []
        for row in range(2):
            with empcause.steer(model, causes[row : row + 1]):
                alone.append(model.generate(ids[row : row + 1], **NEW, **options))
        assert torch.equal(together, torch.cat(alone))
    with empcause.steer(model, causes):
        sampled = model.generate(ids, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy(model, ids, causes).repeat_interleave(3, 0))


@fault(
    Guard(STEERING, "        if ranges != self.ranges:\n", "        if self.ranges is None:\n"),
    Guard(STEERING, "        if not self.begun:\n", "        if True:\n"),
    cause="prefill_chunk_size: the prompt is read in several calls",
    place="generate",
    promise="the answer of reading it at once",
)
def test_prompts_read_in_chunks():
    model = make()
    ids, causes = prompts()
    expected = greedy(model, ids, causes)
    for size in (1, 4, 9, 20):
        with empcause.steer(model, causes):
            assert torch.equal(model.generate(ids, prefill_chunk_size=size, **NEW), expected)


@fault(
    Guard(STEERING, "if generation is not None and generation.steering.decoder is decoder:", "if False:"),
    cause="guidance_scale: generate calls the model for another prompt too",
    place="generate",
    promise="the causes hold for the prompt and never for the other: the literal computation's answer",
)
def test_classifier_free_guidance():
    model = make()
    ids, causes = prompts(rows=1)
    for negative in (ids.flip(1), ids[:, -1:]):
        expected, other = ids, negative
        for _ in range(6):
            steered = logits(model, expected, causes)[:, -1].log_softmax(-1)
            free = model(other).logits[:, -1].log_softmax(-1)
            token = (1.7 * (steered - free) + free).argmax(-1, keepdim=True)
            expected, other = torch.cat([expected, token], 1), torch.cat([other, token], 1)
        for use_cache in (True, False):
            with empcause.steer(model, causes):
                found = model.generate(
                    ids, guidance_scale=1.7, negative_prompt_ids=negative, use_cache=use_cache, **NEW
                )
            assert torch.equal(found, expected)


@fault(
    Guard(STEERING, "if self.causes is not None:", "if False:"),
    Guard(STEERING, "generation.steering.model is model:  # the model drafts for itself", "False:"),
    cause="a draft is made by an assistant, by the model's own first layers, or looked up in the prompt",
    place="generate",
    promise="the steered model decides: its own greedy answer",
)
def test_drafts():
    model = make()
    assistant = make(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=64, **SPECIAL))
    ids, causes = prompts(rows=1)
    expected = greedy(model, ids, causes)
    for options in ({"assistant_model": assistant}, {"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 2}):
        with empcause.steer(model, causes):
            assert torch.equal(model.generate(ids, **NEW, **options), expected)


@fault(
    Guard(
        STEERING,
        "self.causes = self.causes.to(tokens.device)\n        ranges",
        "self.causes = self.causes.to(self.model.device)\n        ranges",
    ),
    Guard(
        STEERING,
        "self.causes = self.causes.to(tokens.device)\n        cache",
        "self.causes = self.causes.to(steering.model.device)\n        cache",
    ),
    Guard(STEERING, "                        setattr(module, name, method.own)\n", "                        pass\n"),
    Guard(STEERING, "if not self.holders:", "if False:"),
    Guard(STEERING, ", updated=()", ""),
    cause="the model is offloaded, its weights on no device between calls; accelerate replaces its methods before or inside",
    place="calls of the model, and generate",
    promise="steered as in memory; accelerate's own methods are back afterwards",
)
def test_offloaded_models():
    model = make()
    ids, causes = prompts()
    expected, answer = logits(model, ids, causes), greedy(model, ids, causes)
    cpu_offload(model, execution_device="cpu")
    add_hook_to_module(model.model, ModelHook())
    assert model.device.type == "meta"
    before = vars(model.model)["forward"]
    with torch.no_grad(), empcause.steer(model, causes):
        close(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, **NEW), answer)
    assert vars(model.model)["forward"] is before
    model = make()
    plain = model(ids).logits
    with empcause.steer(model, causes):
        add_hook_to_module(model.model, ModelHook())
        close(model(ids).logits, expected)
    close(model(ids).logits, plain)
    with empcause.steer(model, causes):
        close(model(ids).logits, expected)
    close(model(ids).logits, plain)


@fault(
    Guard(STEERING, "if not steering.called:", "if False:"),
    Guard(STEERING, "    steering.called = True\n", ""),
    Guard(STEERING, "                    delattr(module, name)\n", "                    pass\n"),
    cause="nothing is called inside the context, or the body fails first",
    place="the end of the context",
    promise="an error that nothing was steered, which never hides what the body raised; nothing stays on the model",
)
def test_nothing_steered():
    model = make()
    ids, causes = prompts()
    plain = model(ids).logits
    with pytest.raises(RuntimeError, match="Nothing was steered"), empcause.steer(model, causes):
        make(GPT2)(ids)

    def answers():
        with empcause.steer(model, causes):
            yield

    for error in (ZeroDivisionError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), empcause.steer(model, causes):
            raise error
    generator = answers()
    next(generator)
    contextvars.Context().run(generator.close)
    assert torch.equal(model(ids).logits, plain)
    with empcause.steer(model, causes):
        model.generate(ids, **NEW)
    assert not {"forward", "generate"} & (vars(model).keys() | vars(model.model).keys())


@fault(
    Guard(STEERING, "if model.config.is_encoder_decoder or decoder.config.is_encoder_decoder:", "if False:"),
    Guard(STEERING, 'if inputs.get("encoder_hidden_states") is not None:', "if False:"),
    cause="an encoder-decoder, or attention to an encoder's states",
    place="steer, and calls of the model",
    promise="refused by name: causes never weigh tokens that they are not meant for",
)
def test_encoder_decoders():
    config = BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    ids, causes = prompts()
    bart = BartForConditionalGeneration(config)
    bart.config._attn_implementation = "empcause"
    for model in (bart, bart.model.decoder):
        model.config._attn_implementation = "empcause"
        with pytest.raises(ValueError, match="is an encoder-decoder"), empcause.steer(model, causes):
            pass
    crossed = make(GPT2Config(**{**GPT2.to_dict(), "add_cross_attention": True}))
    with pytest.raises(ValueError, match="encoder_hidden_states"), empcause.steer(crossed, causes):
        crossed(ids, encoder_hidden_states=torch.randn(2, 9, 32))


@fault(
    Guard(STEERING, "return causes.clone()", "return causes"),
    Guard(STEERING, "if causes.dim() != 2 or not causes.is_floating_point():", "if False:"),
    Guard(STEERING, "if not self._right:", "if False:"),
    Guard(STEERING, "except (TypeError, ValueError, RuntimeError) as error:", "except ZeroDivisionError as error:"),
    cause="causes as lists, arrays, booleans, token ids, ragged or wrong numbers; a tensor that is changed afterwards",
    place="steer",
    promise="taken with their values at the beginning, or refused in a sentence",
)
def test_causes_of_other_kinds():
    model = make()
    ids, causes = prompts()
    hard = causes > 1
    kinds = [(causes.tolist(), causes), (causes.numpy(), causes), (causes.double(), causes)]
    kinds += [(hard, hard.float()), (hard.numpy(), hard.float()), (hard.int().tolist(), hard.float())]
    for given, meant in kinds:
        with empcause.steer(model, given):
            found = model(ids).logits
        close(found, logits(model, ids, meant))
    changed = causes.clone()
    with empcause.steer(model, changed):
        changed.zero_()
        found = model(ids).logits
    close(found, logits(model, ids, causes))
    nan = causes.clone()
    nan[0, 0] = float("nan")
    for wrong in (ids, ids.numpy(), causes[0], causes[0].tolist(), [[0.1], [0.2, 0.3]], [["much"]], "much", None, nan):
        with pytest.raises(ValueError, match="cause_probs must be"), empcause.steer(model, wrong):
            pass
    for gamma in (float("nan"), np.inf, "1", None):
        with pytest.raises(ValueError, match="gamma must be a finite number"), empcause.steer(model, causes, gamma):
            pass


@fault(
    Guard(STEERING, "if len(self.layers) != self.number:", "if False:"),
    Guard(STEERING, "        self.check()\n        steering = self.steering", "        steering = self.steering"),
    Guard(STEERING, "        generation.check()\n", ""),
    Guard(STEERING, "        if generation.witness is None:\n", "        if False:\n"),
    cause="the causes are lost on their way to some of the attention layers, or calls do not go through generate's own method",
    place="calls of the model, and every step of generate",
    promise="an error that counts the layers or names generate",
)
def test_layers_that_lose_the_causes():
    model = make(GPT2)
    ids, causes = prompts()
    block = model.transformer.h[1]
    hears = block.forward

    def deaf(*args, cause_probs=None, **kwargs):
        return hears(*args, **kwargs)

    block.forward = deaf
    for call in (model, lambda ids: model.generate(ids, max_new_tokens=1), lambda ids: model.generate(ids, **NEW)):
        with pytest.raises(RuntimeError, match="1 of its 2 layers"), empcause.steer(model, causes):
            call(ids)
    steps = []

    def later(*args, **kwargs):
        steps.append(None)
        return (deaf if len(steps) > 1 else hears)(*args, **kwargs)

    block.forward = later
    with pytest.raises(RuntimeError, match="1 of its 2 layers"), empcause.steer(model, causes):
        model.generate(ids, max_new_tokens=3)
    assert len(steps) == 2
    block.forward = hears
    prepares = type(model).prepare_inputs_for_generation.__get__(model)

    def as_prompt_tuning_does():
        model.prepare_inputs_for_generation = prepares
        model.generate(ids, **NEW)

    with pytest.raises(RuntimeError, match="it did not prepare"), empcause.steer(model, causes):
        as_prompt_tuning_does()
    assert model.prepare_inputs_for_generation is prepares


@fault(
    Guard(STEERING, "        self.check_implementation()\n        names", "        names"),
    Guard(STEERING, "        steering.check_implementation()\n", ""),
    Guard(STEERING, "if any(other.open and", "if any(False and"),
    Guard(STEERING, 'if inputs.get("cause_probs") is not None:', "if False:"),
    cause="another attention implementation is set inside, steer is used inside steer, or the call has causes already",
    place="steer, calls of the model, and generate",
    promise="refused by name, and the outer steering goes on",
)
def test_two_meanings_at_once():
    model = make()
    ids, causes = prompts()
    expected = logits(model, ids, causes)
    with empcause.steer(model, causes):
        for inner in (model, model.model):
            with pytest.raises(ValueError, match="steer is used inside steer"), empcause.steer(inner, causes):
                pass
        with pytest.raises(ValueError, match="given by the call already"):
            model(ids, cause_probs=causes)
        close(model(ids).logits, expected)
        model.set_attn_implementation("eager")
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="would ignore the causes"):
                call(ids)
        model.set_attn_implementation("empcause")
        close(model(ids).logits, expected)


@fault(
    Guard(STEERING, "return operator.itemgetter(0), ((self.__wrapped__,),)", "return object.__reduce__(self)"),
    cause="the model is copied, pickled or saved while it is steered",
    place="inside the context",
    promise="copies are whole models of their own, not steered, that nothing of the steering stays on",
)
def test_copies(tmp_path):
    model = make()
    ids, causes = prompts()
    plain, answer = model(ids).logits, greedy(model, ids, causes * 0)
    with empcause.steer(model, causes):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        model.save_pretrained(tmp_path)
        close(model(ids).logits, logits(copies[0], ids, causes))
        copies.append(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="empcause"))
        for copied in copies:
            copied.lm_head.weight.data.mul_(2)
            close(copied(ids).logits, 2 * plain)
            assert torch.equal(copied.generate(ids, **NEW), answer)
    with empcause.steer(copies[0], causes):
        close(copies[0](ids).logits, 2 * logits(model, ids, causes))


@fault(
    Guard(STEERING, "type(model).generate is not GenerationMixin.generate or", "False or"),
    Guard(STEERING, '"init_continuous_batching": _refuse,', ""),
    Guard(STEERING, '"load_custom_generate": _refuse,', ""),
    cause="a way to generate that calls the model in an order of its own",
    place="generate of a model of one's own, custom_generate, continuous batching",
    promise="refused by name before anything is computed",
)
def test_other_ways_to_generate():
    class Own(type(make())):
        def generate(self, ids):
            return self(ids).logits

    ids, causes = prompts()
    model = make()
    own = Own._from_config(LLAMA, attn_implementation="empcause")
    with pytest.raises(ValueError, match="in a way of its own"), empcause.steer(own, causes):
        own.generate(ids)
    with empcause.steer(model, causes):
        with pytest.raises(ValueError, match="in a way of its own"):
            model.generate(ids, custom_generate=lambda model, input_ids, **kwargs: input_ids)
        with pytest.raises(ValueError, match="cannot be steered"):
            model.generate_batch(ids.tolist())
        with pytest.raises(ValueError, match="cannot be steered"):
            model.load_custom_generate("somebody/decoding", trust_remote_code=True)
