"""The documentation's pictures: MLflow's page on a finished ablation, and the page to try one of its models.

    python -m tests.screenshots RUNS_DIR CLIP --out docs/images

In: the directory that `ablate.py configs/ablation/table3.yaml` filled, and an audio file. Out: small PNGs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from mlflow.tracking import MlflowClient
from PIL import Image

from tests.browser import Page, browser
from tests.lab import process
from tests.mlflow_ui import MlflowUi
from tests.ranks import ROOT, free_port

SEARCH = "tags.kind = 'finetune' and tags.table3 LIKE '%'"
METRICS = ("loss", "eval_mAP", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    store = f"sqlite:///{args.runs.resolve()}/mlflow.db"
    mlflow_port, demo_port = free_port(), free_port()
    client = MlflowClient(store)
    runs = client.search_runs(
        [client.get_experiment_by_name("ablation").experiment_id], SEARCH, order_by=["metrics.final_mAP DESC"]
    )
    address = f"http://127.0.0.1:{mlflow_port}"
    server = [sys.executable, "-m", "mlflow", "server", "--port", str(mlflow_port), "--workers", "1",
              "--backend-store-uri", store]  # fmt: skip
    demo = [sys.executable, str(ROOT / "launchers" / "demo_app.py"), "--port", str(demo_port), "--checkpoint",
            runs[0].data.tags["run_dir"]]  # fmt: skip
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with (
            process(server, folder / "mlflow.log", f"{address}/health", env),
            process(demo, folder / "demo.log", f"http://127.0.0.1:{demo_port}", env),
            browser(folder / "profile") as page,
        ):
            ui = MlflowUi(page, address)
            experiment = runs[0].info.experiment_id
            ui.rank(experiment, SEARCH, "final_mAP", len(runs), charts=True)
            ui.charts(METRICS, len(runs))
            shoot(page, args.out / "mlflow_runs.png", 760)
            ui.rank(experiment, SEARCH, "final_mAP", len(runs))
            ui.select((runs[0].info.run_id, runs[-1].info.run_id))
            ui.compare()
            for switch in page.all('button[role=switch]'):  # show diff only
                page.click(switch)
            metric = page.first('a[title="Plot chart"]')
            page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", metric)
            time.sleep(2)
            shoot(page, args.out / "mlflow_compare.png", 857)
            page.driver.get(f"http://127.0.0.1:{demo_port}")
            page.first("#audio input[type=file]").send_keys(str(args.clip.resolve()))
            page.first("#plot img")
            page.until(lambda: "%" in page.first("#labels").text, "labels")
            shoot(page, args.out / "demo_page.png", 740)


def shoot(page: Page, path: Path, height: int) -> None:
    """A screenshot of the upper part, in 256 colours: half of the bytes."""
    page.shoot(path)
    picture = Image.open(path).convert("RGB")
    picture.crop((0, 0, picture.width, height)).quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(json.dumps({path.name: os.path.getsize(path)}))


if __name__ == "__main__":
    main()
