"""Generated requests, and what tells without our automata whether their answers are right."""
