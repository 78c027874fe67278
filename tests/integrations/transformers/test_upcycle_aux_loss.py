"""The auxiliary loss of a model upcycled in place is that of the tokens and the layers of one forward."""

import copy

import pytest
import torch
from tiny_models import make_batch, make_dense
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.integrations.transformers import aux_loss, parallelize, upcycle
from tritonmoe.integrations.transformers.upcycle.inplace import AUX_LOSS_WEIGHT, UpcycledFFN
from tritonmoe.integrations.transformers.upcycle.token_masks import EnclosingCall, TokenMask, find_mask
from tritonmoe.routing import load_balance_loss

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0
MASK[1, 9:] = 0
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


def make_moe(name: str, **changes) -> nn.Module:
    """A model in training mode that drops nothing."""
    moe = upcycle(make_dense(name, **changes), 4, 2, target="inplace").train()
    for module in moe.modules():
        for field in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return moe


def layers_of(model: nn.Module) -> list[UpcycledFFN]:
    return [module for module in model.modules() if isinstance(module, UpcycledFFN)]


def loss_of_last_calls(layers: list[UpcycledFFN]) -> Tensor:
    """What the layers' last calls give, all rows counted."""
    return sum(AUX_LOSS_WEIGHT * load_balance_loss(layer.last_routing, 4) for layer in layers)


def router_gradients(model: nn.Module) -> list[Tensor]:
    return [layer.router.weight.grad.clone() for layer in layers_of(model)]


def padded(batch: dict[str, Tensor], size: int, side: str) -> dict[str, Tensor]:
    """The batch with that many more columns, and the masks that say so."""
    wider = {}
    for name, values in batch.items():
        padding = torch.full((2, size), 7, dtype=values.dtype)
        parts, ones = [values, padding], [torch.ones_like(values), torch.zeros_like(padding)]
        order = -1 if side == "left" else 1
        wider[name] = torch.cat(parts[::order], dim=1)
        mask = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
        wider[mask] = torch.cat(ones[::order], dim=1).long()
    return wider


@pytest.mark.sweep(1)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5", "gemma3", "xlnet", "deberta", "lfm2"])
def test_padding_is_not_counted(name, attention):
    """XLNet's rows are (S, B), OPT's are flat."""
    moe = make_moe(name)
    moe.set_attn_implementation(attention)
    batch = make_batch(moe)
    moe(**batch)
    expected = loss_of_last_calls(layers_of(moe))
    assert torch.equal(aux_loss(moe), expected)
    for size in (0, 5, 10):
        for side in ("right",) if name in ("bert", "deberta") else ("right", "left"):
            wider = padded(batch, size, side)
            if name == "gpt2":
                wider["position_ids"] = (wider["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            moe(**wider)
            torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)
            if size:
                assert (loss_of_last_calls(layers_of(moe)) - expected).abs() > 1e-4 * expected


def loss_of_tokens(layer: UpcycledFFN, is_token: Tensor) -> Tensor:
    """What the layer's last call gives of these rows (T,) alone."""
    routing, tokens = layer.last_routing, is_token.flatten().nonzero().flatten()
    scores, chosen = routing.scores[tokens], routing.topk_ids[tokens].flatten()
    fraction = chosen.bincount(minlength=4) / len(chosen)
    return 0.01 * 4 * (fraction * scores.mean(dim=0)).sum()


def test_a_mask_of_samples_where_rows_are_frames():
    moe = make_moe("wav2vec2", layerdrop=0.0, apply_spec_augment=False)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[0, 300:] = 0
    frames = moe(**make_batch(moe), attention_mask=mask).last_hidden_state.shape[1]
    is_token = moe._get_feature_vector_attention_mask(frames, mask)
    assert 0 < is_token.sum() < is_token.numel()
    expected = sum(loss_of_tokens(layer, is_token) for layer in layers_of(moe))
    torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    """Masked tokens count nowhere: the loss and the routers' gradients are those of the tokens' rows alone."""
    moe = make_moe("t5")
    moe(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS, decoder_attention_mask=MASK.flip(0))
    layers = layers_of(moe)
    expected = sum(loss_of_tokens(layer, MASK if number < 2 else MASK.flip(0)) for number, layer in enumerate(layers))
    torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)
    weights = [layer.router.weight for layer in layers]
    actual = torch.autograd.grad(aux_loss(moe), weights, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, weights), **TOLERANCE)


def test_every_way_to_give_a_mask():
    moe = make_moe("gpt2")
    moe.set_attn_implementation("eager")
    moe(IDS, attention_mask=MASK)
    expected = aux_loss(moe)
    may_see = torch.ones(11, 11, dtype=torch.bool).tril() & MASK.bool()[:, None, None]
    added = torch.zeros(2, 1, 11, 11).masked_fill(~may_see, torch.finfo(torch.float32).min)
    segments = MASK * torch.tensor([1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])  # of packed sequences
    ways = {
        "by position": lambda: moe(IDS, None, MASK),
        "float": lambda: moe(IDS, attention_mask=MASK.float()),
        "bool": lambda: moe(IDS, attention_mask=MASK.bool()),
        "4-D, added": lambda: moe(IDS, attention_mask=added),
        "embeddings": lambda: moe(inputs_embeds=moe.transformer.wte(IDS), attention_mask=MASK),
        "a module inside": lambda: moe.transformer(IDS, attention_mask=MASK),
        "a longer prompt": lambda: moe(IDS, attention_mask=MASK, labels=IDS),
    }
    for name, way in ways.items():
        way()
        torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE, msg=name)
    moe.set_attn_implementation("sdpa")
    moe(IDS, attention_mask=may_see)
    torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)
    moe(IDS, attention_mask=segments)
    torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(aux_loss(moe.eval()), expected, **TOLERANCE)
        moe(IDS)
    assert abs(aux_loss(moe) - expected) > 1e-5


def test_later_tokens_with_a_cache():
    moe = make_moe("gpt2").eval()
    with torch.no_grad():
        left = torch.ones_like(IDS)
        left[0, :5] = 0
        cache = moe(IDS[:, :4], attention_mask=left[:, :4], use_cache=True).past_key_values
        moe(IDS[:, 4:], attention_mask=left, past_key_values=cache)
        routings = [layer.last_routing.of_tokens(left[:, 4:].flatten() > 0) for layer in layers_of(moe)]
        expected = sum(AUX_LOSS_WEIGHT * load_balance_loss(routing, 4) for routing in routings)
        torch.testing.assert_close(aux_loss(moe), expected, **TOLERANCE)
        moe.generate(IDS, attention_mask=left, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert aux_loss(moe) > 0


def test_layers_that_a_forward_skips_are_not_counted():
    moe = make_moe("opt", layerdrop=0.6, num_hidden_layers=3)
    numbers = set()
    for seed in range(8):
        ran = []
        hooks = [layer.register_forward_hook(lambda layer, *_, ran=ran: ran.append(layer)) for layer in layers_of(moe)]
        torch.manual_seed(seed)
        output = moe(IDS, labels=IDS)
        for hook in hooks:
            hook.remove()
        expected = loss_of_last_calls(ran) if ran else torch.zeros(())
        torch.testing.assert_close(aux_loss(moe), expected)
        logits = output.logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, IDS[:, 1:].flatten()) + expected)
        output.loss.backward()
        numbers.add(len(ran))
    assert len(numbers) >= 3
    assert 0 in numbers


def test_a_decoder_on_cached_encoder_outputs():
    moe = make_moe("t5")
    encoded = moe.encoder(IDS, attention_mask=MASK)
    of_encoder = aux_loss(moe)
    assert torch.equal(aux_loss(moe.encoder), of_encoder)
    moe(encoder_outputs=encoded, attention_mask=MASK, decoder_input_ids=IDS)
    of_decoder = aux_loss(moe)
    torch.testing.assert_close(of_decoder, loss_of_last_calls(layers_of(moe.decoder)))
    moe(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)
    torch.testing.assert_close(aux_loss(moe), of_encoder + of_decoder)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_all_chunks_of_a_layer_are_counted_together(chunk_size):
    results, counts = [], []
    for size in (0, chunk_size):
        moe = make_moe("bert", chunk_size_feed_forward=size)
        moe(IDS[:, :9], attention_mask=MASK[:, :9])
        loss = aux_loss(moe)
        loss.backward()
        results.append([loss.detach(), *router_gradients(moe)])
        counts.append([layer.statistics().counts for layer in layers_of(moe)])
        for layer in layers_of(moe):
            columns = layer.last_routing.topk_ids.split(2 * (size or 9))  # a chunk has (B, S / C) rows
            ids = torch.cat([chunk.view(2, -1, 2) for chunk in columns], dim=1)
            results[-1].append(ids.sort(dim=2).values)
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    assert all(torch.equal(*both) and both[0].sum() == 2 * 9 * 2 for both in zip(*counts, strict=True))


def test_of_layers_that_a_forward_skipped_nothing_is_left():
    moe = make_moe("gpt2")
    layer = layers_of(moe)[0]
    moe(IDS)
    assert layer.statistics().num_routed_pairs == IDS.numel() * 2
    moe.transformer.h[0].forward = lambda rows, *_, **__: rows
    moe(IDS)
    assert layer.aux_loss is layer.last_routing is None
    with pytest.raises(RuntimeError, match="its last forward skipped it"):
        layer.statistics()


@pytest.mark.parametrize(
    "way",
    [
        "checkpointed",
        pytest.param("compiled", marks=pytest.mark.slow),
        pytest.param("compiled blocks", marks=pytest.mark.thorough),
        "spread",
        "spread and checkpointed",
    ],
)
def test_losses_and_gradients_of_many_forwards(way, request):
    """Two forwards before a backward, then a third: as plainly, whatever runs the blocks."""
    results = []
    for kind in ("plain", way):
        called = moe = make_moe("gpt2")
        if "spread" in kind:
            parallelize(moe, request.getfixturevalue("group"))
        if "checkpointed" in kind:
            moe.gradient_checkpointing_enable({"use_reentrant": False})
        if kind == "compiled":
            called = torch.compile(moe, backend="aot_eager")
        if kind == "compiled blocks":
            for block in moe.transformer.h:
                block.compile(backend="aot_eager")
        first = called(IDS, attention_mask=MASK, labels=IDS).loss
        second = called(IDS.flip(1), attention_mask=MASK, labels=IDS).loss
        (first + second).backward()
        third = called(IDS.flip(0), attention_mask=MASK, labels=IDS).loss
        third.backward()
        results.append([first.detach(), second.detach(), third.detach(), *router_gradients(moe)])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_halves_of_a_batch_have_their_own(group):
    moe = make_moe("gpt2")
    expected = []
    for row in range(2):
        moe(IDS[row : row + 1], attention_mask=MASK[row : row + 1])
        expected.append(aux_loss(moe).detach())
    parallelize(moe, group)

    def half(row: int) -> Tensor:
        moe(IDS[row : row + 1], attention_mask=MASK[row : row + 1])
        return aux_loss(moe).detach()

    torch.testing.assert_close(list(tm.two_batches(half, 0, 1)), expected)


def test_a_forward_that_was_interrupted_leaves_nothing():
    moe = make_moe("gpt2")
    expected = moe(IDS, attention_mask=MASK, labels=IDS).loss

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = moe.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        moe(IDS[:, :3])
    hook.remove()
    for other in (moe, copy.deepcopy(moe)):
        assert torch.equal(other(IDS, attention_mask=MASK, labels=IDS).loss, expected)
    assert all(not layer.around for layer in layers_of(moe))


def test_blocks_that_are_called_by_hand():
    moe = make_moe("gpt2")
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(4))
    for block in moe.transformer.h:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    torch.testing.assert_close(aux_loss(moe), loss_of_last_calls(layers_of(moe)))


def call(mask: object, is_model: bool = True, takes_mask: bool = True) -> EnclosingCall:
    return EnclosingCall("", is_model, takes_mask, is_time_major=False, mask=mask)


def test_masks_that_are_not_of_the_rows():
    rows = torch.Size((2, 5))
    of_text = torch.ones(2, 5)
    assert find_mask([call(of_text), call(None, takes_mask=False), call(None, False)], rows) == TokenMask()  # a tower
    assert find_mask([call(torch.ones(2, 40)), call(None, is_model=False)], rows) == TokenMask()  # layers mask nothing
    of_patches = torch.tensor([[True, True, False, False, True]]).expand(2, 5)  # as SigLIP 2 makes of another argument
    made = of_patches[:, None, None].expand(2, 1, 5, 5)
    found = find_mask([call(of_text), call(None, takes_mask=False), call(made, is_model=False)], rows)
    assert torch.equal(found.tokens, of_patches)
    longer = torch.ones(2, 1, 5, 9, dtype=torch.bool)  # of a static cache
    assert find_mask([call(None), call(longer, is_model=False)._replace(has_cache=True)], rows) == TokenMask()
    found = find_mask([call(MASK), call({"full_attention": torch.ones(2, 1, 11, 11)})], MASK.shape)  # Gemma's own
    assert torch.equal(found.tokens, MASK > 0)
    additive = torch.tensor([[0.0, -1e9, 0.0, 1e4, 0.0]]).expand(2, 5)  # as Longformer makes, of more columns
    found = find_mask([call(torch.ones(2, 3)), call(additive, is_model=False)], rows)
    assert torch.equal(found.tokens, additive > -1)
    for mask in (torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5, 5), object()):
        assert "can't be told from the attention mask" in find_mask([call(mask)], rows).problem
    layer = layers_of(make_moe("gpt2"))[0]
    layer.around = (call(torch.ones(2, 40)),)
    layer(torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match=r"rows \(2, 5\) are padding can't be told from the attention mask \(2, 40\)"):
        aux_loss(layer)
