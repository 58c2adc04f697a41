"""What an evaluation or a run looks like: the HTML report, contact sheets and loss curves."""
