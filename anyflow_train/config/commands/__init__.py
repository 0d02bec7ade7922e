"""Config of the commands other than `train`, one file per command."""

from anyflow_train.config.commands.bench import BenchConfig as BenchConfig
from anyflow_train.config.commands.check import CheckOptions as CheckOptions
from anyflow_train.config.commands.clips import ClipsConfig as ClipsConfig
from anyflow_train.config.commands.demo import DemoConfig as DemoConfig
from anyflow_train.config.commands.distil import DistilOptions as DistilOptions
from anyflow_train.config.commands.evaluate import EvaluateConfig as EvaluateConfig
from anyflow_train.config.commands.export import ExportConfig as ExportConfig
from anyflow_train.config.commands.plan import PlanOptions as PlanOptions
from anyflow_train.config.commands.prepare import PrepareConfig as PrepareConfig
from anyflow_train.config.commands.runs import RunsConfig as RunsConfig
from anyflow_train.config.commands.sample import SampleConfig as SampleConfig
from anyflow_train.config.commands.shards import ShardsConfig as ShardsConfig
from anyflow_train.config.commands.sweep import SweepOptions as SweepOptions
from anyflow_train.config.commands.watch import ReportConfig as ReportConfig
from anyflow_train.config.commands.watch import WatchConfig as WatchConfig
