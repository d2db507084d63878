"""From logits to tokens: parameters, penalties, filters, grammars, chance."""
