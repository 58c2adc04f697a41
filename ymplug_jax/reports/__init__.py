"""Reports of evaluations and runs: HTML report, contact sheets and loss curves."""
