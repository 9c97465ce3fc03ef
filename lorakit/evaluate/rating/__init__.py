"""People as judges: questions, the sheet on which they rate answers, what they exported, and the report on it."""
