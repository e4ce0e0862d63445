"""Will a run fit, how long will it take, and how is it best started: answered from the configuration alone.

`rehearse.py` builds model and adapter on the meta device and runs a step there (`trace.py`), `memory.py` adds what a strategy holds,
`traffic.py` what it sends, `speed.py` how long that takes, `choice.py` picks. Called by `cli/plan.py`.
"""
