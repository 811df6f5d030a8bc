"""The columns of the dataflows: each declared once, with dims and dtype. Who writes them is in
workers/roles.py and controllers/."""

from __future__ import annotations

from hybridflow.columns import declare

# Prompts, from the loop.
PROMPT_IDS = declare("prompt_ids", "batch time", "int64", "tokens of the prompt")
UID = declare(
    "uid",
    "batch",
    "int64",
    "number of the prompt's use: dataset row + epoch * rows; samples of one prompt share it",
)
MAX_RESPONSE_TOKENS = declare(
    "max_response_tokens",
    "batch",
    "int64",
    "most tokens of the row's response; the sampling settings' limit holds too",
)
EXTRAS = declare("extras", "batch", "object", "dict of the dataset's further columns (answer, ...)")

IMAGES = declare(
    "images",
    "batch",
    "object",
    "the images of the row as references (workers/images), in the order of their tokens; in runs whose "
    "model sees images",
)

TASK = declare(
    "task",
    "batch",
    "object",
    "dict that an episode begins with: the dataset's further columns, and `prompt` where there is "
    "one",
)

# Demonstrations and preference pairs, from the loop.
LOSS_MASK = declare(
    "loss_mask",
    "batch time",
    "bool",
    "True for the response tokens that are scored: the assistant's turns of a demonstration, what "
    "the policy sampled where an environment wrote the rest. Columns over response tokens have the "
    "scored ones only; without this column all are scored",
)
SEGMENT_LENGTHS = declare(
    "segment_lengths",
    "batch time",
    "int64",
    "tokens of each of the row's contexts, prompts included, where a history was rewritten: prompt_ids "
    "and response_ids hold one after the other, and none sees another",
)
PAIR = declare(
    "pair",
    "batch",
    "int64",
    "number of the pair that a row belongs to; its two rows are never cut apart",
)
CHOSEN = declare("chosen", "batch", "bool", "True for the preferred row of a pair")
HARM_SIGN = declare(
    "harm_sign", "batch", "float32", "+1 for an unsafe response, -1 for a safe one (Safe-RLHF)"
)

# Generation.
RESPONSE_IDS = declare(
    "response_ids",
    "batch time",
    "int64",
    "the tokens after the prompt: sampled ones, with the one that ended them, and an environment's",
)
ROLLOUT_LOG_PROBS = declare(
    "rollout_log_probs",
    "batch time",
    "float32",
    "log-probs of the response as the generation engine drew it",
)
FINISH_REASON = declare(
    "finish_reason",
    "batch",
    "object",
    "stop or length; of an episode also context, turns, abandoned or failed",
)
NUM_TOKENS = declare(
    "num_tokens", "batch", "int64", "tokens of prompt and response: the cost of a row"
)
NUM_SAMPLED = declare(
    "num_sampled",
    "batch",
    "int64",
    "tokens of the response that the policy sampled, where an environment wrote others",
)
TURN_LENGTHS = declare(
    "turn_lengths", "batch time", "int64", "tokens that the policy sampled in each of its turns"
)
TURN_REWARDS = declare(
    "turn_rewards",
    "batch time",
    "float32",
    "the part of the reward that each turn earned; the rest belongs to the end of the response",
)
EPISODE_REWARDS = declare(
    "episode_rewards", "batch", "float32", "reward that the environment gave to the episode"
)
EPISODE_METRICS = declare(
    "episode_metrics",
    "batch",
    "object",
    "dict of an episode's further numbers, seconds and failed attempts",
)
WEIGHT_VERSION = declare(
    "weight_version", "batch", "int64", "version of the actor's weights that drew the response"
)
TOKEN_VERSION = declare(
    "token_version",
    "batch time",
    "int64",
    "version of the actor's weights that drew each token; weight_version is that of the first",
)
ROUTES = declare(
    "routes",
    "batch time layers experts",
    "int16",
    "experts of a mixture that each token but the last was sent to, by layer with experts; -1 where "
    "that is not known",
)
REPLICA = declare(
    "replica", "batch", "int64", "data coordinate of the generation layout that draws the row"
)

# Inference.
LOG_PROBS = declare(
    "log_probs",
    "batch time",
    "float32",
    "log-probs of the response under the actor's training engine",
)
REF_LOG_PROBS = declare(
    "ref_log_probs", "batch time", "float32", "log-probs of the response under the reference"
)
TEACHER_LOG_PROBS = declare(
    "teacher_log_probs",
    "batch time",
    "float32",
    "log-probs of the response under the teacher of a distillation",
)
VALUES = declare("values", "batch time", "float32", "the critic's value before each response token")
SCORES = declare(
    "scores",
    "batch",
    "float32",
    "score of the whole response by the model that is trained on preferences",
)
REWARDS = declare("rewards", "batch", "float32", "reward of the whole response")
REWARD_METRICS = declare(
    "reward_metrics", "batch", "object", "dict of further numbers of the reward function"
)
GOLD_REWARDS = declare(
    "gold_rewards",
    "batch",
    "float32",
    "reward of the whole response by the role `gold`, in validation",
)
GOLD_METRICS = declare(
    "gold_metrics", "batch", "object", "dict of further numbers of the gold reward's function"
)
BASELINE_REWARDS = declare(
    "baseline_rewards", "batch", "float32", "reward of the prompt's greedy response (ReMax)"
)
COSTS = declare("costs", "batch", "float32", "cost of the whole response (Safe-RLHF)")
COST_METRICS = declare(
    "cost_metrics", "batch", "object", "dict of further numbers of the cost function"
)

# The controller's numbers.
MINI_BATCH = declare(
    "mini_batch", "batch", "int64", "number of the mini-batch that a row is trained in, from 0"
)
ADVANTAGES = declare("advantages", "batch time", "float32", "advantage of each response token")
RETURNS = declare("returns", "batch time", "float32", "the critic's target at each response token")
COST_VALUES = declare(
    "cost_values",
    "batch time",
    "float32",
    "the cost critic's value before each response token (Safe-RLHF)",
)
COST_RETURNS = declare(
    "cost_returns", "batch time", "float32", "the cost critic's target at each response token"
)
COVARIANCE_SELECTED = declare(
    "covariance_selected",
    "batch time",
    "bool",
    "whether the losses clip_cov and kl_cov act on the token",
)
PRETRAIN = declare(
    "pretrain",
    "batch",
    "bool",
    "a row of the pretraining text: prompt_ids is its first token, response_ids the rest",
)
