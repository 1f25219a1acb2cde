# What offramp and bench import from transformers, with its types. The package's own __init__ imports the modules of all
# 400 models for a type checker, which takes a sixth of the time of `make lint`.
from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForImageClassification as AutoModelForImageClassification
from transformers.models.auto.modeling_auto import (
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
)
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.models.bert.configuration_bert import BertConfig as BertConfig
from transformers.models.bert.modeling_bert import BertForSequenceClassification as BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertModel as BertModel
from transformers.models.bert.tokenization_bert import BertTokenizer as BertTokenizer
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig as DistilBertConfig
from transformers.models.distilbert.modeling_distilbert import DistilBertModel as DistilBertModel
from transformers.trainer import Trainer as Trainer
from transformers.trainer_callback import PrinterCallback as PrinterCallback
from transformers.trainer_callback import TrainerCallback as TrainerCallback
from transformers.trainer_utils import set_seed as set_seed
from transformers.training_args import TrainingArguments as TrainingArguments
from transformers.utils import logging as logging

__version__: str
