# Everything needs only python3 (3.11 or newer), make and a package index; uv is bootstrapped where it is missing.
SHELL := /bin/bash
PYTHON ?= python3
UV := $(shell command -v uv || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
export ORT_DISABLE_TELEMETRY := 1

.PHONY: serve triton test check acceptance bench docs api dashboard lock clean

serve: .serve-venv/.built ## the server with the shipped encoders and a sample gallery, on http://127.0.0.1:8000
	.serve-venv/bin/patchsight-serve

triton: .serve-venv/.built .triton-venv/.built ## a real NVIDIA Triton with the shipped encoders, on grpc://127.0.0.1:8011
	.serve-venv/bin/patchsight-models triton --to .triton-venv/models
	.serve-venv/bin/python -m patchsight_serve.triton_server .triton-venv .triton-venv/models

test: .venv/.built .triton-venv/.built ## every test, by two processes: 24 to 46 minutes on 2 cores
	.venv/bin/python -m pytest -m "not acceptance" -n 2 --dist loadfile

check: .venv/.built ## lint, types, import directions
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

acceptance: .venv/.built .triton-venv/.built ## the same suites at full counts, and every command of README and docs
	.venv/bin/python -m pytest --durations=15

bench: .venv/.built .triton-venv/.built ## each figure of the README, into benchmarks/results/
	for name in encoders public_encoders precision scaled_decode serving saturation overhead engines triton_gateway outputs attention augmentation multi_crop training gallery regions; do .venv/bin/python benchmarks/$$name.py || exit 1; done

docs: .venv/.built ## README aside, all that there is to read, as pages in site/; nothing in them asks the network for anything
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --site-dir site
	@echo "open site/index.html, or, for the search to work: $(PYTHON) -m http.server -d site 8080"

api: .venv/.built ## docs/openapi.json and docs/curl.md, from the routes as they are
	.venv/bin/python docs/write_api.py

dashboard: ## deploy/grafana/dashboard.json
	$(PYTHON) deploy/grafana/write_dashboard.py

lock: $(UV) ## resolve anew: one lock for every extra
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --all-extras --group test -p 3.11 \
	    pyproject.toml -o requirements.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-deps --group triton -p 3.11 \
	    -o requirements-triton.lock

clean:
	rm -rf .venv .serve-venv .triton-venv .uv dist site

# The serving environment: the base install and the map's UMAP at the locked versions, without torch.
.serve-venv/.built: pyproject.toml requirements.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .serve-venv
	$(UV) pip compile --quiet --generate-hashes --constraints requirements.lock --python .serve-venv/bin/python \
	    --extra map pyproject.toml -o .serve-venv/requirements.txt
	$(UV) pip sync --quiet --require-hashes --python .serve-venv/bin/python .serve-venv/requirements.txt
	$(UV) pip install --quiet --no-deps --python .serve-venv/bin/python --editable .
	touch $@

# The full environment: everything in the lock.
.venv/.built: pyproject.toml requirements.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python .venv/bin/python requirements.lock
	$(UV) pip install --quiet --no-deps --python .venv/bin/python --editable .
	touch $@

# Triton's environment, for its server and what it runs the models with: another numpy than ours.
.triton-venv/.built: requirements-triton.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .triton-venv
	$(UV) pip sync --quiet --require-hashes --python .triton-venv/bin/python requirements-triton.lock
	touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv
