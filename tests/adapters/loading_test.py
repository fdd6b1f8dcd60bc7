import numpy as np

from distill.adapters.loading import StoredParams
from distill.checkpoints import hf


def test_stored_params_give_the_parameters_of_the_files_under_canonical_names(llama_dir):
  config, params = hf.load(llama_dir)
  stored = StoredParams(llama_dir)
  assert stored.config == config and set(stored) == set(params) and len(stored) == len(params)
  for name in ("embed.table", "layers.1.mixer.q.kernel"):
    np.testing.assert_array_equal(stored[name], params[name])
    assert stored.shape(name) == params[name].shape
