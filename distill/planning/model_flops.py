"""FLOPs that the models themselves need, by which the utilisation of a device (MFU) is counted."""

from distill.models.decoder import Decoder


def forward_flops(decoder: Decoder, *, length: int) -> float:
  """Returns the forward FLOPs of one token: two for each parameter of a matrix that it meets, and the mixing.

  Of the experts of a mixture a token meets those that are chosen. Embeddings are looked up, which costs nothing; norms,
  activations and the softmax are not counted.

  Args:
    decoder: The architecture.
    length: Positions of a document.
  """
  config = decoder.config
  total = 0.0
  for name, x in decoder.unrolled.abstract().items():
    in_group = name.startswith("groups.")
    if x.ndim - in_group < 2 or ".conv." in name or name == "positions.table":
      continue
    if name == "embed.table" and not config.tie_embeddings:
      continue
    share = 1.0
    if ".experts." in name:
      mlp = config.layers[int(name.split(".")[1])].mlp
      share = mlp.top_k / mlp.num_experts  # type: ignore[union-attr]
    total += 2 * x.size * share
  return total + sum(layer.mixer.mixing_flops(length) for layer in config.layers)
