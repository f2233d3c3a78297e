"""Imported at start-up by ``make sanitize``: drops the hook of the editable install, so that PYTHONPATH decides."""

import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
