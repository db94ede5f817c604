"""synthaug: balanced, defensible synthetic samples for scarce image classes.

Importing this package is light: neither torch nor prefect is loaded (a test says so).
"""

import os

__version__ = "0.1.0"

# Nothing calls home. Each of these libraries reads its variable when it is first imported, so they
# are set here, before any of them can be. `setdefault`: a user who wants telemetry may say so.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The second version of Prefect's pages asks Amplitude for its settings, whatever the line above says.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
}.items():
    os.environ.setdefault(_name, _value)

# Threads of the arithmetic spin only briefly while they wait for each other, then sleep. On a machine that does
# anything else beside, spinning threads wait for ones that have no core; on an idle one short waits are still spun
# through. Measured in docs/log.md (2026-11-23). Read when torch loads its OpenMP library.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
