#!/usr/bin/env bash
# reasoning-gym 0.1.25: score_answer(answer, entry), which says how right an answer is, raises on ordinary wrong answers:
# ValueError in prime_factorization, KeyError in game_of_life, TypeError in boxnet. game_of_life_halting gives 1.0, which is
# right, for any answer at all, the opposite of its own included. chain_sum, for comparison, does neither. Seen on 2026-11-29
# with Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cat >"$folder/seen.py" <<'PYTHON'
import reasoning_gym

ANSWERS = {
    "chain_sum": ["It is 12 x y", "I do not know.", "42"],
    "prime_factorization": ["It is 12 x y", "I do not know.", "42"],
    "game_of_life": ['{"rows": 3}', "I do not know."],
    "boxnet": ["42", "I do not know."],
    "game_of_life_halting": ["True", "False", "I do not know."],
}


def scored(data, answer, entry):
    try:
        return data.score_answer(answer, entry)
    except Exception as error:
        return type(error).__name__


for name, answers in ANSWERS.items():
    data = reasoning_gym.create_dataset(name, size=4, seed=1)
    print(name, *(f"{answer!r}: {scored(data, answer, data[0])}" for answer in answers))
PYTHON
cat >"$folder/expected" <<'TEXT'
chain_sum 'It is 12 x y': 0.0 'I do not know.': 0.0 '42': 0.0
prime_factorization 'It is 12 x y': ValueError 'I do not know.': ValueError '42': 0.01
game_of_life '{"rows": 3}': KeyError 'I do not know.': 0.0
boxnet '42': TypeError 'I do not know.': 0.0
game_of_life_halting 'True': 1.0 'False': 1.0 'I do not know.': 1.0
TEXT
cd "$folder"
env/bin/python -W ignore seen.py 2>errors | tee seen || { cat errors; exit 1; }
diff expected seen
