"""Each guide has a block of Python that runs as it stands, with a tiny model in the place of the reader's."""

import json
import re
from pathlib import Path

import pytest

from .conftest import TEXT
from .tiny_vlm import save_pictures, save_vlm


GUIDES = sorted((Path(__file__).parents[1] / "examples" / "guides").glob("*.md"))
# The numbers of a tiny model in the place of those of a large one.
TINY = {
    r"(target_layers=|keep=|\"--target_layers\",\s+\")2[134]": r"\g<1>4",
    r"max_steps=\d+": "max_steps=4",
    r"length=1024": "length=32",
    r'"Qwen/Qwen2.5-1.5B-Instruct"': '"model"',
}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_block_of_a_guide_runs(guide, folder, tokenizer, capsys):
    rows = [{"text": TEXT[i : i + 400]} for i in range(0, len(TEXT) - 400, 40)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day to you."}]
    Path("chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    Path("model/chat_template.jinja").write_text(template)
    save_vlm("vlm", tokenizer)
    pictures = [{"images": [path], "messages": talk} for path in save_pictures(16)]
    Path("pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pictures))
    [code] = re.findall(r"```python\n(.*?)```", guide.read_text(), re.S)
    for pattern, number in TINY.items():
        code = re.sub(pattern, number, code)
    if "TrainingArguments(" in code:
        code = code.replace('report_to="none"', 'report_to="none", use_cpu=True')
    exec(compile(code, guide.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out or list(Path().glob("out/*"))


def test_readme_links_every_guide():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert {f"examples/guides/{guide.name}" for guide in GUIDES} <= set(re.findall(r"\]\((.*?)\)", readme))
    for guide in GUIDES:
        assert len(guide.read_text().splitlines()) <= 75, guide.name  # about a screen
        for link in re.findall(r"\]\((\.\./[^)#]*)", guide.read_text()):
            assert (guide.parent / link).exists(), link
