"""The launch scripts: the commands they print, and their behaviour with stand-ins for a cloud."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

FOLDER = pathlib.Path(__file__).parent.parent / "launch"
# A shell would take the last ones apart, or put in something else.
FLAGS = [
    "--config=configs/imagenet.py:l",
    "--workdir=/runs/l",
    "--config.data.train_transforms=('random_crop(32)', \"a\\b\")",
    "--config.data.path=$HOME/a & {name}",
]
CLOUD = ["--name=pod", "--zone=zone-a", "--project=p1", "--type=v5litepod-16", "--version=v2"]
SCRIPTS = {
    "tpu_vm.sh": [*CLOUD, "--setup=mount a b && echo 'c d'", "--spot"],
    "tpu_pod.sh": [*CLOUD, "--setup=mount a b && echo 'c d'", "--spot", "--slices=2"],
    "tpu_host.sh": ["--setup=mount a b && echo 'c d'"],
    "gke_jobset.sh": [
        "--name=pod",
        "--image=registry/image:1",
        "--accelerator=tpu-v5p-slice",
        "--topology=4x4x4",
        "--claim=runs",
        "--slices=2",
    ],
    "slurm.sbatch": [],
    "local.sh": ["--processes=2"],
}
COMMANDS = ["gcloud", "kubectl", "docker", "sbatch", "srun", "scontrol", "git", "python3", "flock"]


def stand_in(folder: pathlib.Path, command: str, body: str) -> None:
    """A command found before the real one of the name; it appends its arguments to calls.txt."""
    folder.mkdir(exist_ok=True)
    file = folder / command
    note = f'printf "%s\\n" "$(printf "%q " {command} "$@")" >> "{folder}/calls.txt"'
    file.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    file.chmod(0o755)


def calls(folder: pathlib.Path) -> list[list[str]]:
    """The commands that were called, with their arguments."""
    file = folder / "calls.txt"
    return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


def launch(script: str, arguments: list[str], stubs: pathlib.Path, **environment: str):
    """Runs a script to its end."""
    return subprocess.run(
        ["bash", FOLDER / script, *arguments],
        capture_output=True,
        text=True,
        env=environment_of(stubs, **environment),
        timeout=300,  # a hang is to be told from a slow machine
    )


def environment_of(stubs: pathlib.Path, **more: str) -> dict[str, str]:
    path = f"{stubs}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(stubs.parent)} | more


def printed(script: str, tmp_path: pathlib.Path) -> list[str]:
    """The lines that a dry run prints; checks that the dry run does nothing else."""
    for command in COMMANDS:
        stand_in(tmp_path / "stubs", command, "exit 99")
    before = sorted(tmp_path.rglob("*"))
    arguments = [*SCRIPTS[script], "--dry-run", "--", *FLAGS]
    ended = launch(script, arguments, tmp_path / "stubs", SLURM_JOB_ID="", TMPDIR=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert calls(tmp_path / "stubs") == [] and sorted(tmp_path.rglob("*")) == before
    subprocess.run(["bash", "-n"], input=ended.stdout, text=True, check=True)  # ready to paste
    return ended.stdout.splitlines()


def after_dashes(command: list[str]) -> list[str]:
    return command[command.index("--") + 1 :]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_prints_its_usage_and_refuses_unknown_arguments(script, tmp_path):
    lines = (FOLDER / script).read_text().splitlines()
    assert len(lines) < 60
    assert any(line.startswith("# Usage: ") for line in lines[:10])
    assert "set -euo pipefail" in lines
    good = SCRIPTS[script]
    wrong = [
        ["--dry-run", *good, "--colour=red", "--", *FLAGS],
        ["--dry-run", *good, "stray", "--", *FLAGS],
        ["--dry-run", *good, "--", FLAGS[0]],
        ["--dry-run", *good, "--", FLAGS[1]],
        *(["--dry-run", *good[:i], *good[i + 1 :], "--", *FLAGS] for i in required(script)),
        [],
    ]
    for arguments in wrong:
        ended = launch(script, arguments, tmp_path, SLURM_JOB_ID="")
        assert (ended.returncode, ended.stdout) == (2, ""), arguments
        assert "Usage: " in ended.stderr and "set -e" not in ended.stderr


def required(script: str) -> list[int]:
    optional = ("--setup", "--spot", "--slices")
    return [i for i, a in enumerate(SCRIPTS[script]) if not a.startswith(optional)]


def test_shellcheck_finds_nothing():
    found = subprocess.run(
        ["shellcheck", *(FOLDER / name for name in SCRIPTS)], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")
    assert sorted(SCRIPTS) == sorted(p.name for p in FOLDER.glob("*.s*"))


@pytest.mark.parametrize(
    ("script", "distributed", "everywhere"),
    [
        ("tpu_vm.sh", "--distributed=off", []),
        ("tpu_pod.sh", "--distributed=tpu", ["--node=all", "--worker=all", "--batch-size=all"]),
    ],
)
def test_a_tpu_is_asked_for_and_runs_the_same_command_on_every_host(
    script, distributed, everywhere, tmp_path
):
    commands = [shlex.split(x) for x in printed(script, tmp_path) if not x.startswith("#")]
    gcloud = {c[4]: c for c in commands if c[0] == "gcloud"}
    assert set(gcloud) == {"create", "delete", "scp", "ssh"}
    for command in gcloud.values():
        assert command[-2:] == ["--zone=zone-a", "--project=p1"]
    assert {"pod", "--accelerator-type=v5litepod-16", "--spot"} < set(gcloud["create"])
    assert ("--node-count=2" in gcloud["create"]) == (script == "tpu_pod.sh")
    for verb in ("scp", "ssh"):  # all at once: a host that is left out keeps the others waiting
        assert [a for a in gcloud[verb] if a in everywhere] == everywhere
    (remote,) = (a.removeprefix("--command=") for a in gcloud["ssh"] if a.startswith("--command="))
    on_host = shlex.split(remote)
    assert after_dashes(on_host) == [distributed, *FLAGS]
    assert "--setup=mount a b && echo 'c d'" in on_host


@pytest.mark.parametrize(
    ("script", "distributed"),
    [
        ("tpu_host.sh", [[]]),
        ("slurm.sbatch", [["--distributed=slurm"]]),
        ("local.sh", [["--num_processes=2", f"--process_id={i}"] for i in range(2)]),
    ],
)
def test_a_dry_run_prints_the_commands_of_a_host(script, distributed, tmp_path):
    commands = [shlex.split(x.removesuffix(" &")) for x in printed(script, tmp_path)]
    mains = [command for command in commands if "gptv_jax.main" in command]
    assert len(mains) == len(distributed)
    for main, own in zip(mains, distributed, strict=True):
        assert main[-len(own + FLAGS) :] == own + FLAGS


def one_slice(tmp_path: pathlib.Path, script: str, states: list[str], ends: list[int], *more: str):
    """Runs a script with a gcloud that reports `states` in turn and whose ssh exits with `ends`."""
    for name, lines in (("states", states), ("ends", ends)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    gcloud = f"""next() {{ head -n 1 "{tmp_path}/$1" && sed -i 1d "{tmp_path}/$1"; }}
      case $4 in list) next states ;; ssh) exit "$(next ends)" ;; esac"""
    stand_in(tmp_path / "stubs", "gcloud", gcloud)
    for command in ("git", "sleep"):
        stand_in(tmp_path / "stubs", command, "")
    arguments = [a for a in SCRIPTS[script] if not a.startswith("--slices")]
    ended = launch(script, [*arguments, *more, "--", *FLAGS], tmp_path / "stubs")
    return ended.returncode, [c[4] for c in calls(tmp_path / "stubs") if c[0] == "gcloud"]


RUN = ["list", "scp", "ssh"]


def test_a_preempted_pod_is_made_anew_and_runs_again_until_the_run_is_finished(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", ""]
    code, verbs = one_slice(tmp_path, "tpu_pod.sh", [*states, "ACTIVE"], [255, 0])
    waited = ["list", "create", "list", "list", *RUN, "list", "list", "delete", "list", "create"]
    assert (code, verbs) == (0, [*waited, *RUN])
    ssh = [c for c in calls(tmp_path / "stubs") if c[4:5] == ["ssh"]]
    assert len(ssh) == 2 and ssh[0] == ssh[1]
    create = next(c for c in calls(tmp_path / "stubs") if c[4:5] == ["create"])
    assert "--node-id=pod" in create


@pytest.mark.parametrize(
    ("states", "ends", "code", "tried"),
    [
        (["ACTIVE"], [78], 1, 1),  # something to mend
        (["ACTIVE"] * 6, [134, 134, 143, 134, 134, 134], 134, 6),  # dies again and again
        (["FAILED"], [], 1, 0),  # the resource will not come
    ],
)
def test_a_pod_gives_up_where_another_start_would_not_help(states, ends, code, tried, tmp_path):
    found, verbs = one_slice(tmp_path, "tpu_pod.sh", states, ends, "--tries=3")
    assert (found, verbs.count("ssh")) == (code, tried)


@pytest.mark.parametrize(
    ("state", "before"), [("", ["create"]), ("READY", []), ("PREEMPTED", ["delete", "create"])]
)
@pytest.mark.parametrize(("ends", "code"), [(0, 0), (78, 1), (143, 143)])
def test_a_vm_is_made_where_there_is_none(state, before, ends, code, tmp_path):
    found = one_slice(tmp_path, "tpu_vm.sh", [state], [ends])
    assert found == (code, ["list", *before, "scp", "ssh"])


def host(tmp_path: pathlib.Path) -> subprocess.Popen:
    """Starts tpu_host.sh with stand-ins for Python."""
    return subprocess.Popen(
        ["bash", FOLDER / "tpu_host.sh", "--", *FLAGS], env=environment_of(tmp_path / "stubs")
    )


def make_host(tmp_path: pathlib.Path, body: str) -> None:
    """Makes a home folder whose gptv_jax.main is the shell script `body`."""
    stand_in(tmp_path / "stubs", "python3", "")
    (tmp_path / "gptv_jax.venv").mkdir()
    stand_in(tmp_path / "gptv_jax.venv" / "bin", "python", body)


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (1, 78), (143, 143)])
def test_a_host_ends_with_78_for_an_error_that_the_user_can_mend(ends, code, tmp_path):
    make_host(tmp_path, f"exit {ends}")
    assert host(tmp_path).wait() == code
    main = calls(tmp_path / "gptv_jax.venv" / "bin")
    assert main == [["python", "-m", "gptv_jax.main", *FLAGS]]


def test_a_host_runs_one_command_at_a_time_also_after_ssh_broke_off(tmp_path):
    log = tmp_path / "log"
    make_host(tmp_path, f'echo begin >> "{log}"; sleep 1; echo end >> "{log}"')
    first = host(tmp_path)
    while not log.exists():
        time.sleep(0.05)
    second = host(tmp_path)
    first.send_signal(signal.SIGHUP)  # as systemd does beside SIGTERM
    time.sleep(0.3)
    assert first.poll() is None
    first.kill()  # the shell that ssh had started; what it had started goes on
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0
    assert log.read_text().split() == ["begin", "end"] * 2


def test_the_jobset_has_the_fields_that_its_controller_needs(tmp_path):
    first, *lines, last = printed("gke_jobset.sh", tmp_path)
    assert first == "kubectl apply --filename=- <<'END'" and last == "END"
    manifest = yaml.safe_load("\n".join(lines))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "pod"
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    # 4 x 4 x 4 chips, four of them a host, twice; one pod that ends ends the Job, and so the set.
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    pod, failure = job["template"]["spec"], manifest["spec"]["failurePolicy"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    command = container["command"] + container["args"]
    assert command == ["python", "-m", "gptv_jax.main", "--distributed=tpu", *FLAGS]
    (claim,) = pod["volumes"]
    assert container["volumeMounts"] == [{"name": claim["name"], "mountPath": "/runs"}]
    assert claim["persistentVolumeClaim"] == {"claimName": "runs"}
    # What the user can mend fails the set; everything else starts it again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("In", [1])
    assert failure["maxRestarts"] > 0
    (rule,) = failure["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_jobset_is_applied_as_it_is_printed(tmp_path):
    lines = printed("gke_jobset.sh", tmp_path)
    stand_in(tmp_path / "stubs", "kubectl", f'cat > "{tmp_path}/applied"')
    ended = launch("gke_jobset.sh", [*SCRIPTS["gke_jobset.sh"], "--", *FLAGS], tmp_path / "stubs")
    assert ended.returncode == 0
    assert calls(tmp_path / "stubs") == [["kubectl", "apply", "--filename=-"]]
    assert (tmp_path / "applied").read_text().splitlines() == lines[1:-1]


@pytest.mark.parametrize(
    ("ends", "starts", "again"),
    [(0, "", 0), (1, "", 0), (143, "", 1), (143, "50", 1), (134, "", 1), (134, "20", 0)],
)
def test_a_slurm_job_is_queued_again_where_another_start_may_help(ends, starts, again, tmp_path):
    stand_in(tmp_path, "srun", f"exit {ends}")
    stand_in(tmp_path, "scontrol", "")
    more = {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": starts} if starts else {})
    assert launch("slurm.sbatch", ["--", *FLAGS], tmp_path, **more).returncode == ends
    srun, *rest = calls(tmp_path)
    main = ["python", "-m", "gptv_jax.main", "--distributed=slurm", *FLAGS]
    assert srun[0] == "srun" and srun[-len(main) :] == main
    assert rest == [["scontrol", "requeue", "7"]] * again


def test_a_slurm_job_asks_for_notice_and_to_be_queued_again():
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert "--requeue" in options and "--open-mode=append" in options
    (notice,) = (o for o in options if o.startswith("--signal="))
    assert notice.startswith("--signal=TERM@")  # to the tasks; with B: it would be to this script


def local(tmp_path: pathlib.Path, body: str) -> subprocess.Popen:
    """Starts local.sh with three processes, whose gptv_jax.main is the shell script `body`."""
    real = f'[[ $1 != -c ]] || exec {sys.executable} "$@"'  # finds a free port
    number = "[[ $* =~ --process_id=([0-9]) ]] && id=${BASH_REMATCH[1]}"
    stand_in(tmp_path / "stubs", "python", f"{real}\n{number}\n{body}")
    return subprocess.Popen(
        ["bash", FOLDER / "local.sh", "--processes=3", "--devices=2", "--", *FLAGS],
        stdout=subprocess.PIPE,
        text=True,
        env=environment_of(tmp_path / "stubs"),
    )


WAIT = "trap 'echo stopped; exit 143' TERM; while sleep 0.05; do :; done"


def test_local_processes_find_each_other(tmp_path):
    run = local(tmp_path, 'echo "$JAX_NUM_CPU_DEVICES $JAX_PLATFORMS"')
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert sorted(output.splitlines()) == [f"[{i}] 2 cpu" for i in range(3)]
    _, *mains = calls(tmp_path / "stubs")
    address = {a for command in mains for a in command if a.startswith("--coordinator=")}
    assert len(address) == 1 and address.pop().startswith("--coordinator=127.0.0.1:")
    assert sorted(a for command in mains for a in command if a.startswith("--process_id=")) == [
        f"--process_id={i}" for i in range(3)
    ]
    for command in mains:
        assert "--num_processes=3" in command and command[-len(FLAGS) :] == FLAGS


def test_local_processes_are_stopped_when_one_fails(tmp_path):
    run = local(tmp_path, f"if ((id == 1)); then sleep 0.5; exit 3; fi; {WAIT}")
    output, _ = run.communicate(timeout=60)
    assert (run.returncode, sorted(output.split("\n"))) == (3, ["", "[0] stopped", "[2] stopped"])


def test_an_interrupt_stops_all_local_processes(tmp_path):
    run = local(tmp_path, f"echo begun; {WAIT}")
    for _ in range(3):
        assert run.stdout.readline().endswith("] begun\n")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert sorted(output.splitlines()) == [f"[{i}] stopped" for i in range(3)]
