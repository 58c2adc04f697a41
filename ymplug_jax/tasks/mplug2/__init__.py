"""Tasks of mPLUG-2; `config.task` names them mplug2_FILE."""
