"""Graded evaluation: question sets, blind sheets for people, and what their grades say; see docs/chat_evaluation.md."""
