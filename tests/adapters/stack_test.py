"""Stacks of every kind of PEFT LoRA against PEFT itself: merged once, and routed by row."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from distill.adapters import routed
from distill.adapters.loading import load_merged, load_routed
from distill.adapters.merging import merge
from distill.adapters.stack import StackEntry, read_adapters
from distill.checkpoints import hf, hf_config
from distill.errors import InputError
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.teachers.live import LiveTeacher
from distill.types import Batch

# PEFT warns of tied weights, of embeddings it stores whole and of biases.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


SIZES = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
BASES = {
  "plain": dict(model_type="llama", **SIZES),
  "tied": dict(model_type="llama", tie_word_embeddings=True, **SIZES),
  "biased": dict(model_type="llama", attention_bias=True, **SIZES),
  "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
  "phi3": dict(model_type="phi3", **SIZES),
  "gemma2": dict(model_type="gemma2", head_dim=8, **SIZES),
}


def make_base(directory, *, model_type, **fields):
  torch.manual_seed(0)
  special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
  config = transformers.AutoConfig.for_model(model_type, vocab_size=61, **special, **fields)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  model.save_pretrained(directory)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Directories of random models."""
  made = {}
  for name, fields in BASES.items():
    made[name] = tmp_path_factory.mktemp(name)
    make_base(made[name], **fields)
  return made


def load(base):
  return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make_adapter(base, directory, *, seed, resize=0, half=None, **fields):
  """Makes a random adapter that peft saves in `directory`."""
  model = load(base)
  if resize:
    torch.manual_seed(17)
    model.resize_token_embeddings(resize, mean_resizing=False)
  model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        scale = 0.15 if "lora_A" in name or "lora_B" in name or "embedding" in name else 0.1
        parameter += scale * torch.randn_like(parameter)
        if half is not None:
          parameter.data = parameter.to(half).float()
  model.save_pretrained(directory)
  return pathlib.Path(directory)


def theirs_active_together(base, paths):
  """Returns PEFT's model with all adapters active at once."""
  model = peft.PeftModel.from_pretrained(load(base), paths[0], adapter_name="a0")
  for i, path in enumerate(paths[1:], 1):
    model.load_adapter(path, adapter_name=f"a{i}")
  model.base_model.set_adapter([f"a{i}" for i in range(len(paths))])
  return model.eval()


def theirs_one_after_another(base, paths):
  model = load(base)
  for path in paths[:-1]:
    model = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
  return peft.PeftModel.from_pretrained(model, paths[-1]).eval()


def logits_of(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def batch(routes=None, tokens=TOKENS):
  tokens = jnp.asarray(tokens)
  return Batch(
    tokens=tokens,
    segments=jnp.ones_like(tokens),
    positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    loss_mask=jnp.ones(tokens.shape, jnp.float32),
    routes=None if routes is None else jnp.asarray(routes),
  )


def ours_merged(base, stack, tokens=TOKENS):
  config, params = hf.load(base)
  config, merged = merge(params, stack=stack, config=config)
  decoder = Decoder(config)
  stacked = {name: np.asarray(x, np.float32) for name, x in decoder.stack(merged).items()}
  return answer(LiveTeacher(decoder=decoder, params=stacked), batch(tokens=tokens))


def ours_routed(base, stack, routes=None, sets=None, tokens=TOKENS):
  config, params = hf.load(base)
  adapters = read_adapters(stack, config=config)
  chosen = [adapters] if sets is None else [[adapters[i] for i in one] for one in sets]
  config, stacked = routed.stack_with_routes(params, routes=chosen, config=config)
  return answer(LiveTeacher(decoder=Decoder(config), params=stacked), batch(routes, tokens))


def answer(teacher, batch):
  params = {name: jnp.asarray(x) for name, x in teacher.params.items()}
  signal = teacher.signal(params, batch=batch, dtype=jnp.float32)
  return np.asarray(signal.readout.logits(signal.hidden))


def error(got, expected):
  assert got.shape == expected.shape
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# name: (base, mode, settings of each adapter)
STACKS = {
  "patterns": (
    "plain",
    "sequential",
    [
      dict(r=4, lora_alpha=6, target_modules=ALL, rank_pattern={r"layers\.1\.self_attn\..*": 2, "down_proj": 3}),
      dict(
        r=2,
        target_modules=["q_proj", "gate_proj"],
        use_rslora=True,
        alpha_pattern={"model.layers.0.self_attn.q_proj": 5, "q_proj": 3},
        layers_to_transform=[0, 2],
      ),
      dict(r=1, target_modules="all-linear"),
    ],
  ),
  "dora sequential": (
    "plain",
    "sequential",
    [
      dict(r=3, target_modules=["q_proj", "down_proj"], use_dora=True),
      dict(r=2, target_modules=["q_proj", "up_proj"]),
      dict(r=2, target_modules=["q_proj", "o_proj"], use_dora=True, use_rslora=True),
    ],
  ),
  "dora co-active": (
    "plain",
    "co-active",
    [
      dict(r=3, target_modules=["q_proj", "down_proj"], use_dora=True),
      dict(r=2, target_modules=["q_proj", "up_proj"]),
      dict(r=2, target_modules=["q_proj", "o_proj"], use_dora=True, use_rslora=True),
    ],
  ),
  "embedding, head, norm": (
    "plain",
    "sequential",
    [
      dict(r=4, target_modules=["embed_tokens", "lm_head", "v_proj"]),
      dict(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
      dict(r=2, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    ],
  ),
  "embedding, head co-active": (
    "plain",
    "co-active",
    [
      dict(r=4, target_modules=["embed_tokens", "lm_head", "v_proj"]),
      dict(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True),
      dict(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    ],
  ),
  "biases": (
    "biased",
    "sequential",
    [
      dict(r=2, target_modules=["q_proj", "v_proj"], bias="all"),
      dict(r=2, target_modules=["q_proj", "k_proj"], lora_bias=True),
      dict(r=2, target_modules=["q_proj"], bias="lora_only", half=torch.bfloat16),
    ],
  ),
  "a bias where there is none": (
    "plain",
    "sequential",
    [dict(r=2, target_modules=["q_proj", "up_proj"], lora_bias=True)],
  ),
  "tied embedding": ("tied", "sequential", [dict(r=2, target_modules=["embed_tokens", "q_proj"], half=torch.float16)]),
  "tied head": ("tied", "co-active", [dict(r=2, target_modules=["lm_head"]), dict(r=2, target_modules=["v_proj"])]),
  "tied both": ("tied", "sequential", [dict(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)]),
  "tied saved": ("tied", "sequential", [dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])]),
  "tied tokens": (
    "tied",
    "sequential",
    [
      dict(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7, 50]),
      dict(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 5]}),
    ],
  ),
  "gpt2": (
    "gpt2",
    "sequential",
    [
      dict(r=3, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True, modules_to_save=["ln_f"]),
      dict(r=2, target_modules=["c_attn", "c_proj"], bias="all", rank_pattern={"h.0.attn.c_attn": 3}),
      dict(r=2, target_modules=["c_proj", "wte", "wpe"], lora_bias=False),
    ],
  ),
  "gpt2 co-active": (
    "gpt2",
    "co-active",
    [
      dict(r=3, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
      dict(r=2, target_modules=["c_attn", "mlp.c_proj", "lm_head"], lora_bias=False),
      dict(r=2, target_modules="all-linear", use_dora=True, trainable_token_indices=[2, 60]),
    ],
  ),
  "fused projections": (
    "phi3",
    "sequential",
    [
      dict(r=3, target_modules=["qkv_proj", "gate_up_proj"], use_dora=True),
      dict(r=2, target_modules="all-linear", modules_to_save=["embed_tokens"]),
    ],
  ),
  "scaled embedding, softcaps": (
    "gemma2",
    "co-active",
    [
      dict(r=3, target_modules=["embed_tokens", "q_proj"]),
      dict(r=2, target_modules=["lm_head", "embed_tokens", "o_proj"], use_dora=True),
    ],
  ),
  "tokens": (
    "plain",
    "sequential",
    [dict(r=2, target_modules=["k_proj"], trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [3]})],
  ),
}


@pytest.fixture(scope="module", params=list(STACKS))
def stack(request, bases, tmp_path_factory):
  """(base, stack, PEFT's logits)"""
  kind, mode, settings = STACKS[request.param]
  base = bases[kind]
  directory = tmp_path_factory.mktemp("stack")
  paths = [make_adapter(base, directory / f"{i}", seed=i, **fields) for i, fields in enumerate(settings)]
  model = (theirs_active_together if mode == "co-active" else theirs_one_after_another)(base, paths)
  return base, tuple(StackEntry(path=path, mode=mode) for path in paths), logits_of(model)


def test_a_stack_gives_the_logits_of_peft_when_merged_and_when_routed_by_row(stack):
  base, entries, expected = stack
  assert error(ours_merged(base, entries), expected) < 1e-5
  assert error(ours_routed(base, entries), expected) < 1e-5


def test_a_stack_loaded_onto_a_mesh_gives_the_logits_of_peft_merged_and_routed(stack):
  base, entries, expected = stack
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  adapters = read_adapters(entries, config=hf_config.read_config(base))
  for config, params in (
    load_merged(base, adapters=adapters, mesh=mesh),
    load_routed(base, routes=[adapters, adapters[:1]], mesh=mesh),
  ):
    assert error(answer(LiveTeacher(decoder=Decoder(config), params=params), batch()), expected) < 1e-5


@pytest.mark.parametrize("weight", [0.5])
def test_stack_weights_have_the_same_effect_on_merged_and_on_routed_adapters(stack, weight):
  base, entries, expected = stack
  entries = tuple(dataclasses.replace(entry, weight=weight) for entry in entries)
  merged = ours_merged(base, entries)
  assert error(ours_routed(base, entries), merged) < 1e-5
  assert error(merged, expected) > 1e-3


# Sets of adapters by their place in a list, and the list.
ROUTES = {
  "low rank": (
    [(0,), (1, 0), (), (2,)],
    [
      dict(r=4, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"]),
      dict(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
      dict(r=2, target_modules=["o_proj", "lm_head"], use_rslora=True),
    ],
  ),
  "anything": (
    [(0,), (0, 1), (2,), (3, 2)],
    [
      dict(r=4, target_modules=["q_proj", "lm_head"], use_dora=True),
      dict(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["norm", "embed_tokens"]),
      dict(r=2, target_modules=["o_proj", "k_proj"], lora_bias=True),
      dict(r=2, target_modules=["up_proj"], trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [4]}),
    ],
  ),
}


@pytest.mark.parametrize("name", list(ROUTES))
def test_a_batch_with_four_routes_gives_the_logits_of_four_batches_with_one_route_each(name, bases, tmp_path):
  sets, settings = ROUTES[name]
  base = bases["plain"]
  stack = tuple(
    StackEntry(path=make_adapter(base, tmp_path / f"{i}", seed=i, **fields)) for i, fields in enumerate(settings)
  )
  tokens = np.random.default_rng(1).integers(0, 61, (8, 7))
  order = [3, 0, 1, 2, 2, 0, 3, 1]
  together = ours_routed(base, stack, order, sets, tokens=tokens)
  for route, chosen in enumerate(sets):
    rows = [i for i, one in enumerate(order) if one == route]
    alone = ours_merged(base, tuple(stack[i] for i in chosen), tokens=tokens[rows])
    assert error(together[rows], alone) < 1e-5, route


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_adds_tokens_gives_the_logits_of_the_resized_model_in_peft(tied, bases, tmp_path):
  base = bases["tied" if tied else "plain"]
  path = make_adapter(base, tmp_path / "a", seed=0, resize=64, r=2, target_modules=["q_proj"])
  other = make_adapter(base, tmp_path / "b", seed=1, resize=64, r=2, target_modules=["embed_tokens", "lm_head"])
  for one in (path, other):
    model = load(base)
    model.resize_token_embeddings(64, mean_resizing=False)
    expected = logits_of(peft.PeftModel.from_pretrained(model, one).eval())
    stack = (StackEntry(path=one),)
    assert error(ours_merged(base, stack), expected) < 1e-5
    assert error(ours_routed(base, stack), expected) < 1e-5
  config, params = hf.load(base)
  adapters = read_adapters((StackEntry(path=path), StackEntry(path=tmp_path / "b")), config=config)
  with pytest.raises(InputError, match="has different numbers of tokens"):
    routed.stack_with_routes(params, routes=[adapters, []], config=config)
