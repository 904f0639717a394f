"""The configs of pipelines/README.md are whole: each is accepted and builds the model that it names."""

import re
from pathlib import Path

import pytest
import yaml

from embedshard.cli import main

README = Path(__file__).parents[2] / "pipelines" / "README.md"
CONFIGS = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("text", CONFIGS, ids=[yaml.safe_load(text)["name"] for text in CONFIGS])
def test_a_config_of_the_readme_is_accepted(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["embedshard", "summary", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "10,001" in capsys.readouterr().out


def test_all_five_are_there():
    assert len(CONFIGS) == README.read_text().count("```python") == 5
