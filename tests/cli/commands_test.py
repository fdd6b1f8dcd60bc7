"""Commands on a tiny teacher with its stack, against transformers and peft."""

import json
import re

import numpy as np
import peft
import torch
import transformers


def test_score_of_teacher_and_stack_equals_transformers_with_peft(distill, llama_dir, adapter_dirs, tmp_path):
  tokens = np.random.default_rng(0).integers(0, 300, (2, 33)).astype(np.int32)
  np.save(tmp_path / "tokens.npy", tokens)
  stack = tmp_path / "stack.json"
  stack.write_text(json.dumps({"adapters": [{"path": str(path)} for path in adapter_dirs]}))
  out = tmp_path / "scores.npz"
  common = [f"--model={llama_dir}", f"--tokens={tmp_path / 'tokens.npy'}", f"--out={out}", "--hidden=2,0"]
  distill("score", *common, f"--adapter_stack={stack}")
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  for directory in adapter_dirs:
    model = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
  with torch.no_grad():
    expected = model(torch.tensor(tokens), output_hidden_states=True)
  scores = np.load(out)
  assert sorted(scores) == ["hidden_0", "hidden_2", "logits"]
  for ours, theirs in (
    ("logits", expected.logits),
    ("hidden_0", expected.hidden_states[1]),
    ("hidden_2", expected.hidden_states[3]),
  ):
    np.testing.assert_allclose(scores[ours], theirs.numpy(), atol=1e-5 * float(theirs.abs().max()))


def test_generate_equals_transformers(distill, llama_dir, tokenizer_dir):
  tokenizer = transformers.AutoTokenizer.from_pretrained(llama_dir)
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  texts = []
  for prompt in ("the old model", "here"):
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
      ids = model.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
      )[0, given["input_ids"].shape[1] :]
    texts.append(tokenizer.decode([int(i) for i in ids if int(i) != tokenizer.eos_token_id]) + "\n")
  done = distill("generate", f"--model={llama_dir}", "--prompt=the old model", "--prompt=here", "--max_tokens=12")
  assert done.stdout == "".join(texts)


def test_export_is_bit_equal(distill, llama_dir, tmp_path):
  distill("export", f"--model={llama_dir}", f"--out={tmp_path / 'copy'}")
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    assert (tmp_path / "copy" / name).read_bytes() == (llama_dir / name).read_bytes()


def test_inspect_tells_models_from_adapters(distill, llama_dir, adapter_dirs):
  assert "4 of attention" in distill("inspect", llama_dir).stdout
  assert "rank 4" in distill("inspect", adapter_dirs[0]).stdout


def test_init_writes_a_student_nearer_to_its_teacher_than_a_fresh_one(
  distill, llama_dir, adapter_dirs, text_file, tmp_path
):
  values = json.loads((llama_dir / "config.json").read_text())
  student = {**values, "num_hidden_layers": 3, "intermediate_size": 48, "hidden_size": 28}
  (tmp_path / "student.json").write_text(json.dumps(student))
  stack = ",".join(map(str, adapter_dirs))
  out = tmp_path / "out"
  done = distill(
    "init",
    f"--teacher={llama_dir}",
    f"--adapters={stack}",
    f"--student={tmp_path / 'student.json'}",
    f"--calibration={text_file}",
    f"--out={out}",
    "--rows=12",
    "--length=32",
  )
  started, fresh = (float(one) for one in re.findall(r"(?:rows:|fresh) ([0-9.]+)", done.stdout)[-2:])
  assert 0.0 < started < fresh
  for said in ("cut: neurons 48 of 64", "channels 28 of 32", "transformers.LlamaForCausalLM loads it"):
    assert said in done.stdout
  _, loaded = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
  assert not any(loaded.values())
  assert transformers.AutoTokenizer.from_pretrained(out)("old")["input_ids"]


def test_alone_it_lists_the_commands(distill):
  shown = distill().stdout
  for name in ("train", "init", "score", "generate", "compare", "export", "merge", "inspect"):
    assert f"\n  {name} " in shown
