# What each target does is described in CONTRIBUTING.md.

check:
	ruff check . && ruff format --check . && mypy && codespell

format:
	ruff check --fix . && ruff format .

test:
	pytest

slow:
	pytest -m slow

ci:
	.ci/run

.PHONY: check format test slow ci
