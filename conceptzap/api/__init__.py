"""The verbs, from `erase` to `verify`, and `load`, `save`, `inspect`. No logic of their own."""

from conceptzap.api.drawing import applied as applied
from conceptzap.api.drawing import apply as apply
from conceptzap.api.drawing import demo_pipeline as demo_pipeline
from conceptzap.api.drawing import generate as generate
from conceptzap.api.drawing import remove as remove
from conceptzap.api.files import cite as cite
from conceptzap.api.files import examine as examine
from conceptzap.api.files import inspect as inspect
from conceptzap.api.files import load as load
from conceptzap.api.files import lock as lock
from conceptzap.api.files import push as push
from conceptzap.api.files import save as save
from conceptzap.api.files import stack as stack
from conceptzap.api.files import stack_files as stack_files
from conceptzap.api.files import verify as verify
from conceptzap.api.making import erase as erase
from conceptzap.api.making import export as export
from conceptzap.api.making import harden as harden
from conceptzap.api.making import import_ as import_
from conceptzap.api.making import plan as plan
from conceptzap.api.many import erase_all as erase_all
from conceptzap.api.many import plan_all as plan_all
from conceptzap.api.measuring import attack as attack
from conceptzap.api.measuring import bench as bench
from conceptzap.api.measuring import compare as compare
from conceptzap.api.measuring import evaluate as evaluate
