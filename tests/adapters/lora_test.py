import jax
import numpy as np
import pytest

from distill.adapters import lora
from distill.checkpoints import hf, hf_config
from distill.errors import InputError
from distill.models.decoder import Decoder


def test_fresh_lora_changes_nothing_and_exported_factors_equal_the_applied_change(llama_dir):
  config, params = hf.load(llama_dir)
  decoder = Decoder(config)
  stacked = decoder.stack(params)
  adapters = lora.init(decoder, targets=r"layers.*mixer\.[qv]\.kernel", rank=3, key=jax.random.key(0))
  assert sorted(adapters) == [f"groups.0.0.mixer.{p}.kernel.lora_{h}" for p in "qv" for h in "ab"]
  for name, value in lora.apply(stacked, adapters=adapters, scale=2.0).items():
    np.testing.assert_array_equal(value, stacked[name])
  adapters = {name: jax.random.normal(jax.random.key(1), x.shape) for name, x in adapters.items()}
  applied = decoder.unstack(lora.apply(stacked, adapters=adapters, scale=2.0))
  for name, pair in lora.factors(decoder, adapters, scale=2.0).items():
    np.testing.assert_allclose(applied[name], params[name] + 2.0 * pair.a @ pair.b, atol=1e-4)


def test_lora_targets_that_match_no_kernel_or_only_some_layers_of_a_stack_are_refused(llama_dir):
  decoder = Decoder(hf_config.read_config(llama_dir))
  for targets in ("nothing", r"layers\.0\.mixer\.q\.kernel"):
    with pytest.raises(InputError, match="targets"):
      lora.init(decoder, targets=targets, rank=2, key=jax.random.key(0))
