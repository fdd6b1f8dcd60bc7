"""A small teacher and two students of it, as keys of a config.json."""

VOCAB, WIDTH, TEACHER_WIDTH, LENGTH, ROWS = 640, 32, 64, 64, 16
LLAMA = {"model_type": "llama", "vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 4}
TEACHER = {**LLAMA, "hidden_size": TEACHER_WIDTH, "intermediate_size": 128, "num_hidden_layers": 4}
DENSE = {**LLAMA, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True}
HYBRID = {
  "model_type": "qwen3_5_text",
  "vocab_size": VOCAB,
  "hidden_size": WIDTH,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "full_attention_interval": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "head_dim": 8,
  "linear_num_key_heads": 4,
  "linear_num_value_heads": 4,
  "linear_key_head_dim": 8,
  "linear_value_head_dim": 8,
  "tie_word_embeddings": True,
}
