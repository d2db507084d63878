"""Long context: a needle in a haystack, LongBench and L-Eval. Their prompts are written when they are asked."""
