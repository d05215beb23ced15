"""The mathematics: types, schedules, sampling, objectives, surgery, the engine."""
