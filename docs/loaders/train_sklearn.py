"""scikit-learn over a release: arrays with weights, and the same as a pandas frame.

python docs/loaders/train_sklearn.py runs/quickstart/release
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from synthaug.loaders import as_arrays, as_frame

parser = argparse.ArgumentParser()
parser.add_argument("release", type=Path)
arguments = parser.parse_args()

test = as_arrays(arguments.release, split="test", flat=True)
for words, ratio in (("real images alone", 0.0), ("as many synthetic as real", 1.0)):
    train = as_arrays(arguments.release, synthetic_ratio=ratio, synthetic_weight=0.5, flat=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    model.fit(train.images, train.labels, logisticregression__sample_weight=train.weights)
    score = balanced_accuracy_score(test.labels, model.predict(test.images))
    print(f"{words}: {len(train.labels)} images, balanced accuracy on test {score:.3f}")

frame = as_frame(arguments.release, synthetic_ratio=1.0)
print(frame.groupby(["class_name", "is_synthetic"])["sample_id"].count().unstack(fill_value=0).to_string())
